"""What the numba kernels share: how they are compiled, and how bits become floats.

Helpers that hold arithmetic live in the file of the kernel that uses them: numba's disk cache looks only at that file
to see whether a kernel has changed. The conversions between number formats, which cannot change, are in `_storage.py`.
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
"""One number of a numpy type: a kernel is compiled for the types that it is called with."""

REORDER: Set[str] = frozenset({"reassoc", "contract", "nsz", "arcp"})
"""Lets sums be vectorised. Unlike numba's `fastmath=True` it keeps NaN and infinity."""

_BITS = MappingProxyType({torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.uint8})


def jit(fastmath: Set[str] = frozenset()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator that compiles a function on first use, to run without the interpreter lock.

    The machine code goes to a disk cache: beside the source, or in the user's cache folder (NUMBA_CACHE_DIR to choose).
    Where neither can be written, each process compiles for itself.

    Args:
        fastmath: The liberties that the compiler may take with floating point: none, or `REORDER`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # In numpy's error model a division by zero is an infinity: no branch that keeps loops from being vectorised.
        options: dict[str, Any] = {"nogil": True, "fastmath": set(fastmath), "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it may write to
            return numba.njit(**options)(function)

    return decorate


def _cast(source: types.Type, target: types.Type, llvm_type: ir.Type) -> Any:
    """Returns a function for compiled code that reads the 32 bits of one type as another."""

    @intrinsic
    def cast(_context: Any, _value: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], llvm_type)

        return target(source), generate

    return cast


float_from_bits = _cast(types.uint32, types.float32, ir.FloatType())
bits_from_float = _cast(types.float32, types.uint32, ir.IntType(32))


def as_storage(tensor: Tensor) -> Array:
    """Returns the memory of a tensor as a numpy array that numba takes.

    float32 stays; bfloat16 becomes its bits in uint16, float16 its bits in int16 and float8_e4m3fn its bits in uint8,
    so that a kernel can tell them apart by type.
    """
    refuse("a numba kernel")
    bits = _BITS.get(tensor.dtype)
    return (tensor.detach() if bits is None else tensor.detach().view(bits)).numpy()
