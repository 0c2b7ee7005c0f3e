"""The product of a tile with weights in codes, which are dequantised in registers: a part of `product_kernel`.

    sums += x · Wᵀ,   W[n, k] = (value of codes[n, k] - zeros[n, k // group]) · scales[n, k // group]

Two codes of 4 bits share a byte. x is split into its even and its odd columns instead of interleaving the codes: the
sum of two products is the product. A float of a few bits becomes one of 16 bits, which has more bits of exponent, by
moving its bits; the difference of the exponents' offsets is a factor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply_coded(  # type: ignore[no-untyped-def]
    x,
    tensors,
    row,
    has_row,
    start,
    num_inputs,
    group,
    sums,
    KIND: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
):
    """Adds the products of x `[rows, DEPTH]` with some rows of the weights, from column `start` on, to sums.

    `tensors` are codes, scales and zeros. A group has a multiple of 32 columns, or is a whole row: so 32 columns that
    begin at a multiple of 32 have one scale.
    """
    codes_ptr, scales_ptr, zeros_ptr = tensors
    num_groups = tl.cdiv(num_inputs, group)
    column = start + tl.arange(0, DEPTH // 32) * 32
    place = row[None, :] * num_groups + (column // group)[:, None]
    is_inside = has_row & (column[:, None] < num_inputs)
    scales = _as_scale(tl.load(scales_ptr + place, mask=is_inside, other=0))
    if zeros_ptr is not None:
        zeros = tl.load(zeros_ptr + place, mask=is_inside, other=0).to(tl.float32)
    else:
        zeros = tl.full(scales.shape, 8.0 if KIND == "int4" else (128.0 if KIND == "int8" else 0.0), tl.float32)
    if KIND == "int4" or KIND == "e2m1":
        byte = start // 2 + tl.arange(0, DEPTH // 2)
        codes_ptrs = codes_ptr + row[None, :] * (num_inputs // 2) + byte[:, None]
        codes = tl.load(codes_ptrs, mask=has_row & (byte[:, None] < num_inputs // 2), other=0)
        even, odd = tl.split(tl.reshape(x, (x.shape[0], DEPTH // 2, 2)))
        sums = tl.dot(even, _scaled(codes & 15, zeros, scales, x.dtype, KIND), sums, input_precision="ieee")
        sums = tl.dot(odd, _scaled(codes >> 4, zeros, scales, x.dtype, KIND), sums, input_precision="ieee")
    else:
        byte = start + tl.arange(0, DEPTH)
        codes_ptrs = codes_ptr + row[None, :] * num_inputs + byte[:, None]
        codes = tl.load(codes_ptrs, mask=has_row & (byte[:, None] < num_inputs), other=0)
        sums = tl.dot(x, _scaled(codes, zeros, scales, x.dtype, KIND), sums, input_precision="ieee")
    return sums


@triton.jit
def _as_scale(scales):  # type: ignore[no-untyped-def]
    """Returns scales in float32. A byte s stands for 2^(s - 127), whose bits are those of s as an exponent."""
    if scales.dtype == tl.uint8:  # noqa: SIM108  # The type of the result depends on the branch.
        out = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        out = scales
    return out


@triton.jit
def _scaled(codes, zeros, scales, dtype: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns the numbers of codes `[depth, columns]`, by zeros and scales `[depth of groups of 32, columns]`."""
    grouped: tl.constexpr = (scales.shape[0], codes.shape[0] // scales.shape[0], codes.shape[1])
    numbers = tl.reshape(_value(codes, KIND), grouped)
    return tl.reshape((numbers - zeros[:, None, :]) * scales[:, None, :], codes.shape).to(dtype)


@triton.jit
def _value(codes, KIND: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns the value of each code, in float32."""
    if KIND == "e2m1":  # sign, 2 bits of exponent, 1 of mantissa: 1, 5 and 10 bits in a float16
        bits = ((codes & 8).to(tl.uint16) << 12) | ((codes & 7).to(tl.uint16) << 9)
        out = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    elif KIND == "e4m3":  # sign, 4 bits of exponent, 3 of mantissa
        bits = ((codes & 128).to(tl.uint16) << 8) | ((codes & 127).to(tl.uint16) << 7)
        out = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        out = codes.to(tl.float32)
    return out
