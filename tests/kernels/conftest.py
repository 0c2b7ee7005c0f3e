"""What the kernel tests share.

It is also imported by the scripts that run in a process of their own (Triton's interpreter is chosen when triton is
imported), so it uses nothing but the package and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from millrace.kernels._op import Draw, Op, Sample


def nth_sample(op: Op[..., Any], index: int, dtype: torch.dtype, device: str = "cpu") -> Sample:
    """Returns a fresh sample: an op that works in place may have changed an earlier one."""
    return next(islice(op.samples(Draw.seeded(dtype, device)), index, None))


def assert_agrees(
    op: Op[..., Any], implementation: Callable[..., Any], index: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Fails unless an implementation gives what the plain body gives in float64, on sample `index`.

    It compares what is returned, and the arguments as they are afterwards: what must be changed in place, and what must
    not be changed. An op whose tolerance is 0 is compared in its own dtype: its arithmetic is defined to the bit.
    """
    rtol, atol = op.tolerance[dtype]
    exact = rtol == atol == 0
    args = nth_sample(op, index, dtype, device).args
    expected_args = [_clone(arg, exact) for arg in args]
    expected = op.plain(*expected_args)
    result = implementation(*args)
    for actual, wanted in zip(_flatten(result), _flatten(expected), strict=True):
        assert exact or not actual.is_floating_point() or actual.dtype == dtype
        torch.testing.assert_close(actual.to(wanted.dtype), wanted, rtol=rtol, atol=atol)
    for actual, wanted in zip(_flatten(args), _flatten(expected_args), strict=True):
        torch.testing.assert_close(actual.to(wanted.dtype), wanted, rtol=rtol, atol=atol, equal_nan=True)


def _clone(value: Any, exact: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.double() if value.is_floating_point() and not exact else value.clone()


def _flatten(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _flatten(item)] if isinstance(value, (tuple, list)) else []


def poison(patch: Callable[[Any, str, Any], None]) -> None:
    """Makes `torch.empty` and its kin return memory full of NaN (or of the largest integer): nothing may rely on it."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        patch(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return allocate_poisoned


@pytest.fixture
def agrees() -> Callable[..., None]:
    return assert_agrees


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch.setattr)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch's thread count is 2 during a test, so that kernels split their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def draw() -> Draw:
    return Draw.seeded(torch.float32)
