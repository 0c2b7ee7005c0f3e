"""The libraries of compiled CPU kernels: loading them, and the threads that their kernels may use.

An install compiles the kernels into two libraries where it finds a C++ compiler (pyproject.toml): one for CPUs with
AVX512_BF16, and one for those with AVX2 alone, which lacks the kernels that only AVX-512 makes fast. A process loads
the one for its CPU. Nothing is compiled at run time. An op without a compiled kernel runs its numba kernel, or else its
plain torch body.
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
    """Loads the library of compiled kernels for this CPU. Where that fails, logs the reason and returns None."""
    if torch.cpu._is_avx512_bf16_supported():
        return _load("_cpu_kernels")
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return _load("_cpu_kernels_avx2")
    _logger.info("this CPU has no AVX2, which the compiled kernels need: numba and torch run in their place")
    return None


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
