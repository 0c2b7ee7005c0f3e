"""The compiled CPU kernels: `native.cpp` of every op, in one library.

An install compiles them where it finds a C++ compiler (pyproject.toml); nothing is compiled at run time. They need a
CPU with AVX512_BF16. Where either is missing, ops run what they have beside them: numba, or their plain torch body.

A kernel takes one pointer, to a struct that begins with the number of rows and of threads. The kernels share OpenMP's
threads with torch: a second team would fight the first one, which spins between its calls.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from . import tape

__all__ = ["DTYPES", "NativeKernel", "find_library", "kernels_by_dtype", "native_kernel"]

_logger = logging.getLogger(__name__)

DTYPES = MappingProxyType({torch.bfloat16: "bf16", torch.float32: "f32"})
"""What the kernels compute with, and the ends of their names."""


@functools.cache
def find_library() -> ctypes.CDLL | None:
    """Loads the compiled kernels; None, and one warning, where this machine cannot have them."""
    if not torch.cpu._is_avx512_bf16_supported():
        _logger.info("this CPU has no AVX512_BF16, which the compiled kernels need: numba runs in their place")
        return None
    path = Path(__file__).with_name("_cpu_kernels" + str(sysconfig.get_config_var("EXT_SUFFIX")))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _logger.warning(
            "the compiled CPU kernels are missing, so that models run several times slower: install millrace again "
            "where there is a C++ compiler (%s)",
            error,
        )
        return None


class NativeKernel:
    """A function of the library.

    Args:
        function: It.
        layout: The types of its arguments after the number of rows and of threads, as module `struct` writes them.
    """

    def __init__(self, function: Any, layout: str) -> None:
        function.argtypes, function.restype = [ctypes.c_char_p], None
        self._function = function
        self._pack = struct.Struct("@li" + layout).pack
        self._address = ctypes.cast(function, ctypes.c_void_p).value or 0

    def __call__(self, num_rows: int, *args: float) -> None:
        """Runs the kernel on all of torch's threads; or, if a recorder listens, has it take the call down.

        Args:
            num_rows: The rows of its tensors, of which a recording may run fewer.
            args: Numbers and addresses (0 for none), in the order of the layout.
        """
        call = self._pack(num_rows, num_threads(), *args)
        recorder = tape.listening()
        if recorder is None:
            self._function(call)
        else:
            recorder.add(self._address, call)


def native_kernel(name: str, layout: str) -> NativeKernel | None:
    """Looks a kernel up; None where there is no library."""
    library = find_library()
    return NativeKernel(getattr(library, name), layout) if library else None


def kernels_by_dtype(name: str, layout: str) -> Mapping[torch.dtype, NativeKernel]:
    """Looks a kernel up for every type of `DTYPES`; nothing where there is no library."""
    library = find_library()
    endings = DTYPES.items() if library else ()
    return MappingProxyType({dtype: NativeKernel(getattr(library, f"{name}_{end}"), layout) for dtype, end in endings})


class _Process:
    """Knows whether this is a forked child: it has none of its parent's threads, though OpenMP believes so."""

    def __init__(self) -> None:
        self.is_child = False
        os.register_at_fork(after_in_child=self._note_fork)

    def _note_fork(self) -> None:
        self.is_child = True


_process = _Process()


def num_threads() -> int:
    """Returns the threads that a kernel may use: torch's number, in a forked child one."""
    return 1 if _process.is_child else torch.get_num_threads()
