"""How numbers become 8-bit integers, and how a weight of them lies in memory for `int8_linear`.

    packed[panel, 1 + unit, column, i] = weight[64 · panel + column, 4 · unit + i]      0 <= i < 4
    packed[panel, 0, column] = -128 · Σ_i weight[64 · panel + column, i]                as one int32

The CPU's instruction multiplies unsigned by signed bytes, so inputs go in with 128 added to them. What that adds to a
result depends on the weight alone: the sums start from its negative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["INT8_MAX", "PANEL", "UNIT", "can_pack_int8", "pack_int8", "quantize_int8", "unpack_int8"]

PANEL = 64
UNIT = 4
INT8_MAX = 127
OFFSET = 128

SMALLEST = 1e-30
"""A row of smaller numbers counts as zeros: the inverse of its scale might be no float32."""


def quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to 8-bit integers, relative to its largest number; ties to even.

    The arithmetic is in float32 whatever the dtype is: it is defined to the bit.

    Args:
        rows: `[num_rows, size]`.

    Returns:
        `[num_rows, size]` int8, and the scale of each row, `[num_rows]` float32: rows is about their product. The scale
        of a row with a NaN is NaN, and with an infinity infinite.
    """
    wide = rows.to(torch.float32)
    largest = wide.abs().amax(-1) if rows.shape[-1] else wide.new_zeros(len(wide))
    # A number over a tensor would be its reciprocal times the number, rounded twice.
    inverse = torch.where(largest > SMALLEST, largest.new_tensor(INT8_MAX) / largest, 0.0)
    return (wide * inverse[:, None]).round_().nan_to_num_(0.0).to(torch.int8), largest * (1 / INT8_MAX)


def can_pack_int8(in_features: int) -> bool:
    """Says whether a weight of so many columns can be laid out."""
    return in_features % UNIT == 0


def pack_int8(weight: Tensor) -> Tensor:
    """Lays a weight out in panels; the last one is filled up with zeros.

    Args:
        weight: `[out_features, in_features]` int8; in_features is a multiple of 4.

    Returns:
        `[num_panels, 1 + in_features / 4, 64, 4]` int8.
    """
    weight = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    starts = weight.sum(1, dtype=torch.int32) * -OFFSET
    units = torch.cat([starts[:, None], weight.view(torch.int32)], dim=1)
    packed = units.view(-1, PANEL, units.shape[1]).transpose(1, 2).contiguous()
    return packed.view(torch.int8).view(*packed.shape, UNIT)


def unpack_int8(packed: Tensor, out_features: int) -> Tensor:
    """Returns the weight that `pack_int8` laid out, `[out_features, in_features]`."""
    return packed[:, 1:].transpose(1, 2).flatten(2).flatten(0, 1)[:out_features]
