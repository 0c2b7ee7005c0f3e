"""Helpers of the kernel tests.

The scripts that run in a separate process import it too, before they import triton, so it uses only the package, pytest
and torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch

from millrace.kernels._op import Draw, Op, Sample, all_ops


@functools.cache
def samples(op: Op[..., Any], dtype: torch.dtype, device: str = "cpu") -> tuple[Sample, ...]:
    """Draws all samples of an op, and keeps them, because a sample can only be drawn after all samples before it."""
    return tuple(op.samples(Draw.seeded(dtype, device)))


def assert_agrees(
    op: Op[..., Any], implementation: Callable[..., Any], index: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Fails unless an implementation gives what the plain body gives in float64, on sample `index`.

    It compares the results, and the arguments after the call, some of which must change in place and the others not. An
    op whose tolerance is 0 is compared in its own dtype, because its arithmetic is defined to the bit.
    """
    rtol, atol = op.tolerance[dtype]
    exact = rtol == atol == 0
    sample = deepcopy(samples(op, dtype, device)[index])  # an op may work in place
    args = [*sample.args, *sample.kwargs.values()]
    expected_args = [_clone(arg, exact) for arg in args]
    expected = op.plain(*expected_args[: len(sample.args)], **_named(sample, expected_args))
    result = implementation(*sample.args, **sample.kwargs)
    for actual, wanted in zip(_flatten(result), _flatten(expected), strict=True):
        assert exact or not actual.is_floating_point() or actual.dtype in (dtype, *_KEPT_DTYPES)
        _assert_close(actual, wanted, rtol, atol)
    for actual, wanted in zip(_flatten(args), _flatten(expected_args), strict=True):
        _assert_close(actual, wanted, rtol, atol, equal_nan=True)


def assert_fusion_changes_no_bit(kind: str, dtype: torch.dtype, device: str = "cpu") -> int:
    """Fails unless the ops that quantise what they compute give the bits of two ops after each other.

    Args:
        kind: "cpu" or "cuda": the implementations that are compared.
        dtype: The dtype of the samples.
        device: The device of the samples.

    Returns:
        The number of samples.
    """
    ops = all_ops()
    run = {name: op.implementations().get(kind, op.plain) for name, op in ops.items()}
    gelu = {"gelu": "none", "gelu_tanh": "tanh"}
    num_samples = 0
    for sample in samples(ops["rms_norm_fp8"], dtype, device):
        values, scales, residual = run["rms_norm_fp8"](*sample.args, **sample.kwargs)
        normed, wanted_residual = run["rms_norm"](*sample.args, **sample.kwargs)
        _assert_same_bits((values, scales, residual), (*run["quantize_fp8"](normed), wanted_residual))
        num_samples += 1
    for sample in samples(ops["gate_and_mul_fp8"], dtype, device):
        x, activation = sample.args
        gated = run["silu_and_mul"](x) if activation == "silu" else run["gelu_and_mul"](x, gelu[activation])
        _assert_same_bits(run["gate_and_mul_fp8"](x, activation), run["quantize_fp8"](gated))
        num_samples += 1
    return num_samples


def _assert_same_bits(actual: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for ours, theirs in zip(actual, wanted, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


_KEPT_DTYPES = (torch.float32, torch.float8_e4m3fn)
"""The dtypes that an op may return for arguments of any dtype: those of scales, and of 8-bit numbers."""


def _assert_close(actual: torch.Tensor, wanted: torch.Tensor, rtol: float, atol: float, **options: bool) -> None:
    """Compares in the dtype of `wanted`. 8-bit floats may differ by one step (3 bits of mantissa), unless rtol is 0."""
    assert (actual.dtype == torch.float8_e4m3fn) == (wanted.dtype == torch.float8_e4m3fn)
    if wanted.dtype == torch.float8_e4m3fn:
        actual, wanted = actual.float(), wanted.float()
        rtol, atol = (rtol, atol) if rtol == atol == 0 else (0.126, 2.0**-9)
    torch.testing.assert_close(actual.to(wanted.dtype), wanted, rtol=rtol, atol=atol, **options)


def _named(sample: Sample, args: list[Any]) -> dict[str, Any]:
    return dict(zip(sample.kwargs, args[len(sample.args) :], strict=True))


def _clone(value: Any, exact: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    # An 8-bit cache stays in 8 bits, because its rounding is part of the definition.
    is_wide = value.is_floating_point() and value.dtype.itemsize > 1
    return value.double() if is_wide and not exact else value.clone()


def _flatten(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _flatten(item)] if isinstance(value, (tuple, list)) else []


def poison(patch: Callable[[Any, str, Any], None]) -> None:
    """Makes `torch.empty` and similar functions return memory full of NaN (or of the largest integer)."""
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
def fusion_changes_no_bit() -> Callable[..., int]:
    return assert_fusion_changes_no_bit


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
