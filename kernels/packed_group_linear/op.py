"""A linear layer of 4- or 8-bit integers in groups, packed for the CPU: the definition.

    out[t, o] = Σ_i x[t, i] · (q[o, i] - zero[o, i / group]) · scale[o, i / group] + bias[o]

It is `group_linear` over a packed weight. The kernel rounds the inputs of a block to 16 bits (32 in float32), relative
to the largest of them, so that sums over a block are exact integers. The result of a row does not depend on the other
rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op
from ..group_linear import pack_codes
from .layout import PackedGroups, pack_groups, unpack_groups

_SIZES = ((1, 32, 1, 32), (1, 128, 40, 128), (2, 64, 5, 16), (3, 192, 96, 64), (5, 96, 33, 96), (70, 256, 200, 256))
"""Rows, inputs, outputs and the size of a group."""


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, in_features, out_features, group_size in _SIZES:
        for bits in (4, 8):
            x, bias = draw.normal(num_rows, in_features), draw.normal(out_features)
            codes, scales, zeros = _weight(draw, out_features, in_features, group_size, bits)
            name = f"{num_rows} x {in_features} to {out_features}, {bits} bits, groups of {group_size}"
            yield Sample(f"{name}, zeros", (x, codes, scales, zeros, None, out_features))
            half = scales.to(torch.float16)
            yield Sample(f"{name}, bias, float32", (x, codes, half, None, bias, out_features, torch.float32))
    codes, scales, zeros = _weight(draw, 40, 128, 64, 4)
    yield Sample("no rows", (draw.normal(0, 128), codes, scales, zeros, draw.normal(40), 40))
    wider, taller = draw.full(torch.nan, 9, 300), draw.full(torch.nan, 14, 128)
    wider[:, 64:192], taller[::2] = draw.normal(9, 128), draw.normal(7, 128)
    yield Sample("columns of a wider matrix", (wider[:, 64:192], codes, scales.bfloat16(), zeros, None, 40))
    yield Sample("every other row", (taller[::2], codes, scales, zeros, None, 40))
    mixed = draw.normal(9, 128) * 10.0 ** draw.integers(-6, 1, 9, 1).to(draw.dtype)
    mixed[3], mixed[4] = 0, 1e-35
    yield Sample("rows of different size, and zeros", (mixed, codes, scales, zeros, None, 40))
    codes, scales, zeros = _weight(draw, 33, 4096, 4096, 8)
    yield Sample("sums that 32 bits do not hold", (draw.full(1.0, 2, 4096), codes, scales, zeros, None, 33))


def _weight(draw: Draw, out_features: int, in_features: int, group_size: int, bits: int) -> PackedGroups:
    """Returns a packed weight whose product with normal numbers has numbers of about 1."""
    weight = pack_codes(draw.integers(0, 2**bits, out_features, in_features, dtype=torch.uint8), bits)
    shape = (out_features, in_features // group_size)
    scales = draw.normal(*shape, dtype=torch.float32).exp() * in_features**-0.5 / 2**bits
    zeros = draw.integers(0, 2**bits, *shape, dtype=torch.uint8)
    return pack_groups(weight, scales, zeros, in_features, bits)


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
)
def packed_group_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiplies rows by a packed matrix of 4- or 8-bit integers.

    Args:
        x: `[num_rows, in_features]`, any stride between rows.
        codes: The codes as `pack_groups` returns them.
        scales: The scales as `pack_groups` returns them.
        zeros: The zero points as `pack_groups` returns them, or None for half the range of the codes.
        bias: `[out_features]`, the dtype of x, or None for 0.
        out_features: The number of rows of the weight, without the padding.
        dtype: The dtype of the result: float32, or None for that of x.

    Returns:
        `[num_rows, out_features]`. Sums are in float32, and are rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = unpack_groups(PackedGroups(codes, scales, zeros), wide)[:out_features]
    out = x.to(wide) @ weight.t()
    return (out if bias is None else out + bias).to(dtype or x.dtype)
