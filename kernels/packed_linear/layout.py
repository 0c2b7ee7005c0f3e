"""The memory layout of a weight for `packed_linear`: panels of 64 outputs, in the order in which the kernel reads.

    packed[panel, unit, column, i] = weight[64 · panel + column, size · unit + i]      0 <= i < size

A unit is the 32 bits of one lane of a vector: a pair of bfloat16 (size 2) or one float32 (size 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import find_library

__all__ = ["PANEL", "can_pack_panels", "pack_panels", "unit_size", "unpack_panels"]

PANEL = 64


def unit_size(dtype: torch.dtype) -> int:
    """Returns the number of elements of a dtype in a unit of 32 bits."""
    return 4 // dtype.itemsize


def can_pack_panels(weight: Tensor) -> bool:
    """Returns whether panels are the fastest layout of a weight.

    Panels are for bfloat16, with compiled kernels, on a CPU without AMX. With AMX, and in float32, oneDNN is faster.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % unit_size(weight.dtype) == 0
        and hasattr(find_library(), "packed_linear_bf16")
        and not torch.cpu._is_amx_tile_supported()
    )


def pack_panels(weight: Tensor) -> Tensor:
    """Rearranges a weight into panels. The last panel is padded with zeros.

    Args:
        weight: `[out_features, in_features]`, bfloat16 or float32. in_features is a multiple of `unit_size`.

    Returns:
        `[num_panels, num_units, 64, unit_size]`, the dtype of the weight.
    """
    units = F.pad(weight, (0, 0, 0, -len(weight) % PANEL)).view(torch.int32)
    packed = units.view(-1, PANEL, units.shape[1]).transpose(1, 2).contiguous()
    return packed.view(weight.dtype).view(len(packed), -1, PANEL, unit_size(weight.dtype))


def unpack_panels(packed: Tensor, out_features: int) -> Tensor:
    """Returns the weight that was given to `pack_panels`, `[out_features, in_features]`."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features]
