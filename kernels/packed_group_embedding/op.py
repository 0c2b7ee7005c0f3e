"""Lookup of the rows of a table of 4- or 8-bit integers in groups, packed for the CPU: the definition.

    out[t, i] = (q[ids[t], i] - zero[ids[t], i / group]) · scale[ids[t], i / group]

The table is packed as a weight of `packed_group_linear`, because a tied head multiplies by it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op
from ..group_linear import pack_codes
from ..packed_group_linear.layout import PackedGroups, pack_groups, unpack_rows

_SIZES = ((1, 40, 32, 32), (5, 33, 256, 128), (40, 70, 48, 16))
"""Ids, rows and columns of the table, and the size of a group."""


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_ids, num_rows, size, group_size in _SIZES:
        for bits in (4, 8):
            codes, scales, zeros = _table(draw, num_rows, size, group_size, bits)
            ids = draw.integers(0, num_rows, num_ids)
            name = f"{num_ids} of {num_rows} x {size}, {bits} bits, groups of {group_size}"
            yield Sample(f"{name}, zeros", (ids, codes, scales, zeros, draw.dtype))
            for dtype in (torch.float16, torch.bfloat16):
                yield Sample(f"{name}, scales in {dtype}", (ids, codes, scales.to(dtype), None, draw.dtype))
    yield Sample("none", (draw.integers(0, 4, 0), *_table(draw, 4, 32, 16, 4), draw.dtype))


def _table(draw: Draw, num_rows: int, size: int, group_size: int, bits: int) -> PackedGroups:
    """Returns a packed table."""
    codes = pack_codes(draw.integers(0, 2**bits, num_rows, size, dtype=torch.uint8), bits)
    scales = draw.normal(num_rows, size // group_size, dtype=torch.float32)
    zeros = draw.integers(0, 2**bits, num_rows, size // group_size, dtype=torch.uint8)
    return pack_groups(codes, scales, zeros, size, bits)


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-6, 0.0), torch.float16: (1e-3, 1e-7), torch.bfloat16: (8e-3, 0.0)},
)
def packed_group_embedding(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Returns the rows of a packed table with the given ids, dequantised.

    Args:
        ids: `[num_ids]` int64, in `[0, num_rows)`.
        codes: The codes as `pack_groups` returns them.
        scales: The scales as `pack_groups` returns them.
        zeros: The zero points as `pack_groups` returns them, or None for half the range of the codes.
        dtype: The dtype of the result.

    Returns:
        `[num_ids, size]`. The products are in float32, and are rounded once.
    """
    return unpack_rows(PackedGroups(codes, scales, zeros), ids).to(dtype)
