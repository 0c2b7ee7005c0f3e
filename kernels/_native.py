"""Calling the compiled CPU kernels of `_library.py`.

A kernel takes one pointer, to a struct that begins with the number of rows and the number of threads. The kernels share
OpenMP's threads with torch, because threads of their own would compete with those of torch, which spin between calls.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from . import tape
from ._library import find_library, num_threads

__all__ = ["DTYPES", "NativeKernel", "kernels_by_dtype", "native_kernel"]

DTYPES = MappingProxyType({torch.bfloat16: "bf16", torch.float32: "f32"})
"""The dtypes that the kernels compute with, and the suffix of each in the names of the kernels."""


class NativeKernel:
    """A C function of the library of CPU kernels, which is called like a Python function.

    Args:
        function: The C symbol.
        layout: The types of its arguments after the number of rows and of threads, in the notation of module `struct`.
    """

    def __init__(self, function: Any, layout: str) -> None:
        function.argtypes, function.restype = [ctypes.c_char_p], None
        self._function = function
        self._pack = struct.Struct("@li" + layout).pack
        self._address = ctypes.cast(function, ctypes.c_void_p).value or 0

    def __call__(self, num_rows: int, *args: float) -> None:
        """Runs the kernel on as many threads as torch uses, or only records the call while a recording is active.

        Args:
            num_rows: The number of rows of its tensors. A tape may run the recorded call with fewer.
            args: Numbers and addresses (0 for none), in the order of the layout.
        """
        call = self._pack(num_rows, num_threads(), *args)
        recorder = tape.listening()
        if recorder is None:
            self._function(call)
        else:
            recorder.add(self._address, call)


def native_kernel(name: str, layout: str) -> NativeKernel | None:
    """Returns the compiled kernel of a name; None if this machine has no library, or its library no such kernel.

    Args:
        name: Name of the C function.
        layout: Types of its arguments, as in `NativeKernel`.
    """
    function = getattr(find_library(), name, None)
    return NativeKernel(function, layout) if function else None


def kernels_by_dtype(name: str, layout: str) -> Mapping[torch.dtype, NativeKernel]:
    """Returns the compiled kernel of each dtype in `DTYPES`, or an empty mapping if there are none on this machine.

    Args:
        name: Name of the C functions without the suffix of the dtype.
        layout: Types of their arguments, as in `NativeKernel`.
    """
    kernels = ((dtype, native_kernel(f"{name}_{end}", layout)) for dtype, end in DTYPES.items())
    return MappingProxyType({dtype: kernel for dtype, kernel in kernels if kernel is not None})
