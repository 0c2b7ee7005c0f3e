"""A fake asynchronous device, for tests on machines without a GPU.

Tensors stay on the CPU and work is done at once, so results are right; but an operation that would make the host wait
for a GPU fails. While the watch is on, reading a tensor anywhere but in `HostCopy.wait` fails, and so does sending a
tensor other than through `to_device`, or reading a step before the next one was started. A `Breach` is a BaseException,
because the engine catches errors of the model and must not catch it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.engine.device import HostCopies, HostCopy, to_device
from millrace.engine.engine import LLMEngine
from millrace.engine.executor.executor import Executor, StepHandle
from millrace.engine.step.head import StepResult
from millrace.engine.step_plan import StepPlan
from millrace.kernels._op import Op

SYNCHRONISING = (
    "_local_scalar_dense", "argwhere", "equal", "is_nonzero", "masked_select", "nonzero", "unique",
)  # fmt: skip
"""Operators whose result, or its shape, the host must know: names, or beginnings of names."""

READS = ("__array__", "__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist")
SENDS = ("as_tensor", "from_numpy", "tensor")


class Breach(BaseException):
    """An operation for which the host would have waited for the device."""


class Watch(TorchDispatchMode):
    """Fails on operators that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on = False

    @contextmanager
    def set_to(self, is_on: bool) -> Iterator[None]:
        """Turns the watch on or off for the time of a block."""
        before, self.is_on = self.is_on, is_on
        try:
            yield
        finally:
            self.is_on = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_on and _waits(func, args, kwargs):
            raise Breach(f"{func} makes the host wait for the device")
        return func(*args, **kwargs)

    def suspending(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function that may make the host wait: the watch is off while it runs."""

        def suspended(*args: Any, **kwargs: Any) -> Any:
            with self.set_to(False):
                return function(*args, **kwargs)

        return suspended

    def forbidding(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function that fails when it is called while the watch is on."""

        def forbidden(*args: Any, **kwargs: Any) -> Any:
            if self.is_on and threading.current_thread() is threading.main_thread():  # The others read adapters.
                raise Breach(f"{name}() makes the host wait for the device")
            return function(*args, **kwargs)

        return forbidden


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    name = func._schema.name.removeprefix("aten::").lstrip("_")
    if name.startswith(tuple(entry.lstrip("_") for entry in SYNCHRONISING)):
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name.startswith(("index", "index_put")) and len(args) > 1 and isinstance(args[1], (list, tuple)):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return False


class AsyncStep:
    """A step whose result may be read once the next step has started."""

    def __init__(self, step: StepHandle, index: int, executor: AsyncExecutor) -> None:
        self._step, self._index, self._executor = step, index, executor

    def result(self) -> StepResult:
        """Reads the step."""
        self._executor.check_order(self._index)
        return self._step.result()


class AsyncExecutor:
    """Starts steps on another executor, and checks that each is read only after the next one has started."""

    def __init__(self, engine: LLMEngine, watch: Watch) -> None:
        self._inner: Executor = engine.executor
        self._scheduler = engine.scheduler
        self._watch = watch
        self._had_a_plan = False
        self.num_started = 0
        self._scheduler.schedule = self._remembering(self._scheduler.schedule)

    def _remembering(self, schedule: Callable[[], StepPlan | None]) -> Callable[[], StepPlan | None]:
        def remembered() -> StepPlan | None:
            plan = schedule()
            self._had_a_plan = plan is not None
            return plan

        return remembered

    def execute(self, plan: StepPlan) -> AsyncStep:
        """Starts a step."""
        self.num_started += 1
        return AsyncStep(self._inner.execute(plan), self.num_started, self)

    def check_order(self, index: int) -> None:
        """Fails if a step is read before the next one has started, although there was a step to start."""
        is_last = index == self.num_started
        if self._watch.is_on and is_last and self._had_a_plan and self._scheduler.num_unfinished:
            raise Breach(f"step {index} was read before the next one was started")

    def close(self) -> None:
        """Closes the other executor."""
        self._inner.close()


class CallAgain:
    """A recorder that records nothing: a replay calls the function again."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        """Calls the function once."""
        function()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Returns the function."""
        self.num_recorded += 1
        return function

    def close(self) -> None:
        """Does nothing."""


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Patches the watch into torch and the engine until the test ends; it is off at first."""
    watch = Watch()
    for name in READS:
        monkeypatch.setattr(Tensor, name, watch.forbidding(name, getattr(Tensor, name)))
    for name in SENDS:
        monkeypatch.setattr(torch, name, watch.forbidding(name, getattr(torch, name)))
    monkeypatch.setattr(Tensor, "to", _without_host(watch, Tensor.to))
    for module in [module for name, module in sys.modules.items() if name.startswith("millrace.engine")]:
        if vars(module).get("to_device") is to_device:
            monkeypatch.setattr(module, "to_device", watch.suspending(to_device))
    # A kernel is work of the device, although its implementation on a CPU reads its tensors.
    monkeypatch.setattr(Op, "__call__", watch.suspending(Op.__call__))
    monkeypatch.setattr(HostCopy, "wait", watch.suspending(HostCopy.wait))
    monkeypatch.setattr(HostCopies, "start", _snapshot(HostCopies.start))
    with watch:
        yield watch


def _without_host(watch: Watch, function: Callable[..., Any]) -> Callable[..., Any]:
    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if watch.is_on and any(str(arg) == "cpu" for arg in (*args, *kwargs.values())):
            raise Breach("to('cpu') makes the host wait for the device")
        return function(tensor, *args, **kwargs)

    return to


def _snapshot(start: Callable[..., HostCopy]) -> Callable[..., HostCopy]:
    """Wraps `start` so that it copies at once, as a stream does: later writes do not change the copy."""
    return lambda copies, *tensors: start(copies, *(tensor.clone() for tensor in tensors))
