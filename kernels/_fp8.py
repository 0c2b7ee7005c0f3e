"""8-bit floats (e4m3, "fn": no infinity, largest 448) on the GPU, also where the hardware does not know them.

Triton knows the type on NVIDIA GPUs from sm_89 on. Elsewhere a kernel gets the bytes instead (`e4m3_storage`); `widen`
and `narrow` go by the element type of what it was given, so a kernel needs no option. Reading uses the hardware's
conversion where there is one: attention reads whole caches. Writing is always done on the bits: little is written, and
one way to round is the same everywhere.

The format: a sign, 4 bits of exponent with bias 7, 3 bits of mantissa; all ones is NaN. Micikevicius et al., "FP8
Formats for Deep Learning", 2022.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import Target

_FIRST_WITH_E4M3 = 89
_MAX = tl.constexpr(448.0)


def has_e4m3(target: Target) -> bool:
    """Says whether Triton knows e4m3 on a target."""
    return target.name.startswith("sm_") and int(target.name.removeprefix("sm_")) >= _FIRST_WITH_E4M3


def e4m3_storage(tensor: Tensor, target: Target) -> Tensor:
    """Returns what a kernel is to be given for a tensor that may be float8_e4m3fn: itself, or a view of its bytes."""
    if tensor.dtype != torch.float8_e4m3fn or has_e4m3(target):
        return tensor
    return tensor.view(torch.uint8)


def e4m3_type(target: Target) -> str:
    """Returns Triton's name of the element type that `e4m3_storage` gives: for lists of specialisations."""
    return "fp8e4nv" if has_e4m3(target) else "u8"


@triton.jit
def widen(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads numbers of any kind, bytes as e4m3, as `dtype` (fp16, bf16 or fp32): exact for e4m3."""
    return from_e4m3_bits(x).to(dtype) if x.dtype == tl.uint8 else x.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounds float32 to the element type of what it is stored to, ties to even; e4m3 is clamped to +-448 before."""
    is_e4m3: tl.constexpr = dtype == tl.uint8 or dtype == tl.float8e4nv
    return to_e4m3_bits(x).to(dtype, bitcast=True) if is_e4m3 else x.to(dtype)


@triton.jit
def from_e4m3_bits(bits):  # type: ignore[no-untyped-def]
    """Returns the float16 that each byte stands for, exactly.

    Shifted by 7, exponent and mantissa are those of a float16, whose bias is 15: the number divided by 256.
    """
    shifted = (bits.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001  # the extended sign fills bits 15 and 14
    wide = shifted.to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), wide)


@triton.jit
def to_e4m3_bits(x):  # type: ignore[no-untyped-def]
    """Rounds float32 to e4m3 after clamping to +-448, ties to even, and returns the bytes. NaN stays NaN.

    At 2^-6 and above, float32 is rounded to 3 bits of mantissa by adding just under half of what is cut off. Below, the
    numbers are multiples of 2^-9, which is the spacing of float32 at 2^14: adding 2^14 rounds to them.
    """
    size = tl.minimum(tl.abs(x), _MAX)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # the bias goes from 127 to 7
    tiny = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, tiny, normal)
    code = tl.where(x == x, code, 0x7F)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)
