"""The libraries of compiled CPU kernels: loading them, and the threads that their kernels may use.

An install compiles `native.cpp` of every op into one library where it finds a C++ compiler (pyproject.toml). Nothing is
compiled at run time. The kernels need a CPU with AVX512_BF16. Without the library or the CPU, an op runs its numba
kernel, or else its plain torch body. A second library has the `native_avx2.cpp`, for every CPU with AVX2.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sysconfig
from pathlib import Path

import torch

_logger = logging.getLogger(__name__)


@functools.cache
def find_library() -> ctypes.CDLL | None:
    """Loads the library of compiled CPU kernels. Where that fails, logs the reason and returns None."""
    if not torch.cpu._is_avx512_bf16_supported():
        _logger.info("this CPU has no AVX512_BF16, which the compiled kernels need: numba runs in their place")
        return None
    return _load("_cpu_kernels")


@functools.cache
def find_avx2_library() -> ctypes.CDLL | None:
    """Loads the library of kernels that need only AVX2 and FMA. Where that fails, logs the reason and returns None."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        _logger.info("this CPU has no AVX2, which kernels of experts and 4-bit weights need: torch runs in their place")
        return None
    return _load("_cpu_kernels_avx2")


def _load(name: str) -> ctypes.CDLL | None:
    path = Path(__file__).with_name(name + str(sysconfig.get_config_var("EXT_SUFFIX")))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _logger.warning(
            "the compiled CPU kernels are missing, so that models run several times slower: install millrace again "
            "where there is a C++ compiler (%s)",
            error,
        )
        return None


class _Process:
    """Knows whether this process is a forked child, which lacks the threads of the parent that OpenMP assumes."""

    def __init__(self) -> None:
        self.is_child = False
        os.register_at_fork(after_in_child=self._note_fork)

    def _note_fork(self) -> None:
        self.is_child = True


_process = _Process()


def num_threads() -> int:
    """Returns the number of threads that a kernel may use: that of torch, or 1 in a forked child."""
    return 1 if _process.is_child else torch.get_num_threads()
