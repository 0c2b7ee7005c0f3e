"""Recording the CPU kernels of a forward pass, to run them again in one call.

Python takes about 20 µs between two kernels, which is most of the time of a step with few sequences. A tape holds the
calls with all their addresses, as a CUDA graph does. The number of rows is not recorded but given to each run, so one
recording of the largest step serves all smaller steps.

While a recording is active, the recorder allocates the results of the kernels. It reuses memory as soon as no tensor
refers to it, and frees it with the tape.
"""

from __future__ import annotations

import contextvars
import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._library import find_library, num_threads

__all__ = ["NotRecordableError", "Tape", "empty", "listening", "record", "refuse"]

_ALIGNMENT = 64
_listener: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("listener", default=None)


class NotRecordableError(Exception):
    """An operation that is not a compiled kernel ran during a recording. The message names the operation."""


def listening() -> _Recorder | None:
    """Returns the recorder of the recording that is active in this thread; None if no recording is active."""
    return _listener.get()


def refuse(what: str) -> None:
    """Raises if a recording is active, because an operation that is not a compiled kernel is about to run.

    Args:
        what: The operation, for the message.

    Raises:
        NotRecordableError: A recording is active.
    """
    if _listener.get() is not None:
        raise NotRecordableError(f"{what} is not a compiled kernel")


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialised tensor for the result of a kernel, allocated by the recorder if one is active."""
    recorder = _listener.get()
    return torch.empty(shape, dtype=dtype) if recorder is None else recorder.empty(shape, dtype)


def record(function: Callable[[], Tensor]) -> tuple[Tape, Tensor]:
    """Runs a function, but records its calls of compiled kernels in place of running them.

    Args:
        function: A function that only makes views and calls compiled kernels, on memory that lasts as long as the tape.

    Returns:
        The tape, and the result of the function. Every run of the tape fills the memory of that result.

    Raises:
        NotRecordableError: The function runs another operation.
        RuntimeError: Another recording is active.
    """
    if _listener.get() is not None:
        raise RuntimeError("a recording cannot be part of another one")
    recorder = _Recorder()
    token = _listener.set(recorder)
    try:
        with _OnlyViews():
            result = function()
    finally:
        _listener.reset(token)
    return Tape(recorder.calls, recorder.memory), result


class Tape:
    """Recorded calls of compiled kernels, which `run` repeats in order.

    Args:
        calls: The address of each kernel, and the bytes of its arguments.
        memory: The memory of the results, which the tape keeps alive.
    """

    def __init__(self, calls: Sequence[tuple[int, bytes]], memory: Sequence[np.ndarray]) -> None:
        self._buffers = [ctypes.create_string_buffer(call, len(call)) for _, call in calls]
        pairs = zip((kernel for kernel, _ in calls), map(ctypes.addressof, self._buffers), strict=True)
        entries = [word for pair in pairs for word in pair]
        self._entries = (ctypes.c_void_p * len(entries))(*entries)
        self._memory = memory

    def run(self, num_rows: int) -> None:
        """Runs the calls with `num_rows` rows, which may be fewer than were recorded, but not more."""
        library: Any = find_library()
        library.run_tape(self._entries, len(self._buffers), ctypes.c_long(num_rows), num_threads())


class _Recorder:
    """Records the calls of compiled kernels, and allocates the memory of their results."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes]] = []
        self.memory: list[np.ndarray] = []
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def add(self, kernel: int, call: bytes) -> None:
        """Records a call: the address of the compiled kernel, and the bytes of its arguments."""
        self.calls.append((kernel, call))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns a tensor, aligned to 64 bytes, in memory of the tape that no other live tensor uses."""
        num_bytes = -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        blocks = self._free[num_bytes]
        if not blocks:
            self.memory.append(np.zeros(num_bytes + _ALIGNMENT, np.uint8))
            blocks.append(self.memory[-1][-self.memory[-1].ctypes.data % _ALIGNMENT :][:num_bytes])
        block = blocks.pop()
        lease = block.view()  # torch keeps this object alive as long as any view of the tensor
        weakref.finalize(lease, blocks.append, block)
        return torch.from_numpy(lease).view(dtype)[: math.prod(shape)].view(tuple(shape))


class _OnlyViews(TorchDispatchMode):
    """A mode of torch that raises `NotRecordableError` at the first operation of torch that is not a view."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False, because torch would import its compiler otherwise, which takes a second and 100 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation of torch if it is a view; raises `NotRecordableError` for every other operation."""
        if not func.is_view:
            raise NotRecordableError(f"{func} is not a compiled kernel")
        return func(*args, **(kwargs or {}))
