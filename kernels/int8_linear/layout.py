"""The memory layout of an 8-bit weight for `int8_linear`.

    packed[panel, 1 + unit, column, i] = weight[64 · panel + column, 4 · unit + i]      0 <= i < 4
    packed[panel, 0, column] = -128 · Σ_i weight[64 · panel + column, i]                as one int32

The CPU instruction multiplies unsigned by signed bytes, so 128 is added to the inputs. That changes a result by an
amount which depends on the weight alone, and the sums start from the negative of that amount.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PANEL", "UNIT", "can_pack_int8", "pack_int8", "unpack_int8"]

PANEL = 64
UNIT = 4
OFFSET = 128


def can_pack_int8(in_features: int) -> bool:
    """Returns whether `pack_int8` supports weights with this number of columns."""
    return in_features % UNIT == 0


def pack_int8(weight: Tensor) -> Tensor:
    """Rearranges a weight into panels. The last panel is padded with zeros.

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
    """Returns the weight that was given to `pack_int8`, `[out_features, in_features]`."""
    return packed[:, 1:].transpose(1, 2).flatten(2).flatten(0, 1)[:out_features]
