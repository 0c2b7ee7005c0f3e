"""Helpers of the numba kernels: compilation, and casts between floats and their bits.

A helper with arithmetic in it belongs into the file of the kernel that uses it, because numba's disk cache looks only
at that file to see whether a kernel has changed. The exception is `_storage.py`: number formats do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from types import MappingProxyType
from typing import Any, TypeAlias

import numba
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .tape import refuse

Array: TypeAlias = npt.NDArray[Any]
Scalar: TypeAlias = Any
"""One number of a numpy type. A kernel is compiled for each combination of types that it is called with."""

REORDER: Set[str] = frozenset({"reassoc", "contract", "nsz", "arcp"})
"""Lets the compiler vectorise sums. Unlike numba's `fastmath=True` it preserves NaN and infinity."""

_BITS = MappingProxyType({torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.uint8})


def jit(fastmath: Set[str] = frozenset()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator that compiles a function on first use, to run without the interpreter lock.

    The machine code is cached on disk, beside the source or in the user's cache folder (NUMBA_CACHE_DIR chooses another
    folder). Where neither can be written to, each process compiles for itself.

    Args:
        fastmath: The relaxations of floating-point arithmetic that the compiler may use: none, or `REORDER`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # In numpy's error model a division by zero gives infinity. Python's adds a branch that prevents vectorising.
        options: dict[str, Any] = {"nogil": True, "fastmath": set(fastmath), "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it may write to
            return numba.njit(**options)(function)

    return decorate


def _cast(source: types.Type, target: types.Type, llvm_type: ir.Type) -> Any:
    """Returns a function for compiled code that reinterprets the 32 bits of one type as another type."""

    @intrinsic
    def cast(_context: Any, _value: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], llvm_type)

        return target(source), generate

    return cast


float_from_bits = _cast(types.uint32, types.float32, ir.FloatType())
bits_from_float = _cast(types.float32, types.uint32, ir.IntType(32))


def as_storage(tensor: Tensor) -> Array:
    """Returns the memory of a tensor as a numpy array of a type that numba supports.

    float32 and int8 stay as they are. The bits of bfloat16 are returned as uint16, those of float16 as int16 and those
    of float8_e4m3fn as uint8, so that a kernel can tell the formats apart by type.
    """
    refuse("a numba kernel")
    bits = _BITS.get(tensor.dtype)
    return (tensor.detach() if bits is None else tensor.detach().view(bits)).numpy()
