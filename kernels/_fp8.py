"""8-bit floats (e4m3, "fn": no infinity, largest 448) on all GPUs, with or without hardware support.

Triton supports the type on NVIDIA GPUs from sm_89 on. On other GPUs a kernel gets the bytes instead (`e4m3_storage`).
`widen` and `narrow` choose by the element type of their argument, so a kernel needs no option. Reading uses the
conversion of the hardware if it has one, because attention reads whole caches. Writing always computes the bits: few
numbers are written, and they are then rounded alike on all GPUs.

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
    """Returns whether Triton supports e4m3 on a target."""
    return target.name.startswith("sm_") and int(target.name.removeprefix("sm_")) >= _FIRST_WITH_E4M3


def e4m3_storage(tensor: Tensor, target: Target) -> Tensor:
    """Returns the tensor, or a view of its bytes if it is float8_e4m3fn and the target does not support that type."""
    if tensor.dtype != torch.float8_e4m3fn or has_e4m3(target):
        return tensor
    return tensor.view(torch.uint8)


def e4m3_type(target: Target) -> str:
    """Returns Triton's name of the element type that `e4m3_storage` returns, for lists of specialisations."""
    return "fp8e4nv" if has_e4m3(target) else "u8"


@triton.jit
def widen(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Converts a tile to `dtype` (fp16, bf16 or fp32). uint8 elements are the bits of e4m3, and converted exactly."""
    return from_e4m3_bits(x).to(dtype) if x.dtype == tl.uint8 else x.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounds float32 to `dtype`, the element type of the output, ties to even. For e4m3, x is clamped to +-448."""
    is_e4m3: tl.constexpr = dtype == tl.uint8 or dtype == tl.float8e4nv
    return to_e4m3_bits(x).to(dtype, bitcast=True) if is_e4m3 else x.to(dtype)


@triton.jit
def row_scale(largest):  # type: ignore[no-untyped-def]
    """Returns the scale of a row whose largest number is given: largest / 448, or 1 for a row of zeros."""
    return tl.where(largest > 0, largest / _MAX, 1.0)


@triton.jit
def divide_by_scales(x, scales_ptr, mask, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Divides x by the scales at `scales_ptr` where `mask` is true, if `dtype`, the type of the output, is e4m3."""
    is_e4m3: tl.constexpr = dtype == tl.uint8 or dtype == tl.float8e4nv
    return tl.div_rn(x, tl.load(scales_ptr, mask=mask, other=1.0)) if is_e4m3 else x


@triton.jit
def from_e4m3_bits(bits):  # type: ignore[no-untyped-def]
    """Converts e4m3 bytes to float16, exactly.

    Exponent and mantissa, shifted left by 7, are the bits of a float16 that is the number divided by 256, because the
    bias of the exponent is 15 in place of 7.
    """
    shifted = (bits.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001  # the extended sign fills bits 15 and 14
    wide = shifted.to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), wide)


@triton.jit
def to_e4m3_bits(x):  # type: ignore[no-untyped-def]
    """Rounds float32 to e4m3 after clamping to +-448, ties to even, and returns the bytes. NaN stays NaN.

    From 2^-6 on, adding just under half of the last kept bit rounds float32 to 3 bits of mantissa. Below 2^-6 the
    numbers are multiples of 2^-9, which is the spacing of float32 at 2^14, so that adding 2^14 rounds to them.
    """
    size = tl.minimum(tl.abs(x), _MAX)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # the bias goes from 127 to 7
    tiny = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, tiny, normal)
    code = tl.where(x == x, code, 0x7F)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)
