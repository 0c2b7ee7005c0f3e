"""How a weight lies in memory for `packed_linear`: in panels of 64 outputs, as `native.cpp` reads them.

    packed[panel, unit, column, i] = weight[64 · panel + column, size · unit + i]      0 <= i < size

A unit is what one lane of a vector takes at once: 32 bits, so a pair of bfloat16 (size 2) or one float32 (size 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import find_library

__all__ = ["PANEL", "can_pack_panels", "pack_panels", "unit_size", "unpack_panels"]

PANEL = 64


def unit_size(dtype: torch.dtype) -> int:
    """Returns how many numbers of a type a unit of 32 bits holds."""
    return 4 // dtype.itemsize


def can_pack_panels(weight: Tensor) -> bool:
    """Says whether a weight is multiplied fastest in panels: bfloat16, compiled kernels, and no AMX for oneDNN to use.

    In float32 oneDNN is faster for many rows.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % unit_size(weight.dtype) == 0
        and find_library() is not None
        and not torch.cpu._is_amx_tile_supported()
    )


def pack_panels(weight: Tensor) -> Tensor:
    """Lays a weight out in panels; the last one is filled up with zeros.

    Args:
        weight: `[out_features, in_features]`, bfloat16 or float32; in_features is a multiple of a unit's size.

    Returns:
        `[num_panels, num_units, 64, unit_size]`, the dtype of the weight.
    """
    units = F.pad(weight, (0, 0, 0, -len(weight) % PANEL)).view(torch.int32)
    packed = units.view(-1, PANEL, units.shape[1]).transpose(1, 2).contiguous()
    return packed.view(weight.dtype).view(len(packed), -1, PANEL, unit_size(weight.dtype))


def unpack_panels(packed: Tensor, out_features: int) -> Tensor:
    """Returns the weight that `pack_panels` laid out, `[out_features, in_features]`."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features]
