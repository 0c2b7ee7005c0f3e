"""Recording the CPU kernels of a forward pass, to run them again in one call.

Between two kernels Python takes some 20 µs, which a step of few sequences spends mostly waiting for. A tape holds the
calls with all their addresses, as a CUDA graph does, but not the number of rows: kernels are told that anew, so one
recording of the largest step serves all smaller ones.

While a recorder listens, results get their memory from it. It gives memory out again as soon as no tensor uses it, and
keeps it until the tape goes.
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
    """Something ran that is not a compiled kernel; the message says what."""


def listening() -> _Recorder | None:
    """Returns the recorder of this thread that takes calls down; None for none, as a rule."""
    return _listener.get()


def refuse(what: str) -> None:
    """Ends a recording, if there is one, because something else than a compiled kernel is about to run.

    Raises:
        NotRecordableError: There is one.
    """
    if _listener.get() is not None:
        raise NotRecordableError(f"{what} is not a compiled kernel")


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns memory for the result of a kernel: torch's, or the recorder's while one listens."""
    recorder = _listener.get()
    return torch.empty(shape, dtype=dtype) if recorder is None else recorder.empty(shape, dtype)


def record(function: Callable[[], Tensor]) -> tuple[Tape, Tensor]:
    """Runs a function, but takes its kernels down in place of running them.

    Args:
        function: Makes views and calls compiled kernels, nothing else, on memory that lasts as long as the tape.

    Returns:
        The tape, and the result of the function, whose memory every run of the tape fills.

    Raises:
        NotRecordableError: The function does something else too.
        RuntimeError: There is a recorder already.
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
    """Recorded calls.

    Args:
        calls: The address of each kernel, and the bytes of its arguments.
        memory: What they write to.
    """

    def __init__(self, calls: Sequence[tuple[int, bytes]], memory: Sequence[np.ndarray]) -> None:
        self._buffers = [ctypes.create_string_buffer(call, len(call)) for _, call in calls]
        pairs = zip((kernel for kernel, _ in calls), map(ctypes.addressof, self._buffers), strict=True)
        entries = [word for pair in pairs for word in pair]
        self._entries = (ctypes.c_void_p * len(entries))(*entries)
        self._memory = memory

    def run(self, num_rows: int) -> None:
        """Runs the calls with so many rows, at most as many as were recorded."""
        library: Any = find_library()
        library.run_tape(self._entries, len(self._buffers), ctypes.c_long(num_rows), num_threads())


class _Recorder:
    """Takes calls down, and gives memory to their results."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes]] = []
        self.memory: list[np.ndarray] = []
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def add(self, kernel: int, call: bytes) -> None:
        """Takes a call down."""
        self.calls.append((kernel, call))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns memory that no tensor uses, aligned to 64 bytes."""
        num_bytes = -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        blocks = self._free[num_bytes]
        if not blocks:
            self.memory.append(np.zeros(num_bytes + _ALIGNMENT, np.uint8))
            blocks.append(self.memory[-1][-self.memory[-1].ctypes.data % _ALIGNMENT :][:num_bytes])
        block = blocks.pop()
        lease = block.view()  # torch holds it as long as any view of the tensor lives
        weakref.finalize(lease, blocks.append, block)
        return torch.from_numpy(lease).view(dtype)[: math.prod(shape)].view(tuple(shape))


class _OnlyViews(TorchDispatchMode):
    """Ends a recording at the first operation of torch that does more than look at memory in another way."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False: else torch imports its compiler for the first operation, a second and 100 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Lets views pass."""
        if not func.is_view:
            raise NotRecordableError(f"{func} is not a compiled kernel")
        return func(*args, **(kwargs or {}))
