"""The memory layout of gate and up for `packed_gated_linear`: a panel holds 32 outputs of the gate, then 32 of up."""

from __future__ import annotations

from torch import Tensor

from ..packed_linear.layout import PANEL, can_pack_panels, pack_panels, unpack_panels

__all__ = ["can_pack_gated", "pack_gated", "unpack_gated"]

_HALF = PANEL // 2


def can_pack_gated(weight: Tensor) -> bool:
    """Returns whether `pack_gated` supports a weight and makes its product faster."""
    return can_pack_panels(weight) and len(weight) % PANEL == 0


def pack_gated(weight: Tensor) -> Tensor:
    """Rearranges the weights of gate and up into panels.

    Args:
        weight: `[2 * size, in_features]`, the rows of the gate and then those of up. size is a multiple of 32.

    Returns:
        `[2 * size / 64, num_units, 64, unit_size]`, as from `pack_panels`.
    """
    halves = weight.view(2, -1, _HALF, weight.shape[1])
    return pack_panels(halves.transpose(0, 1).reshape(weight.shape))


def unpack_gated(packed: Tensor) -> Tensor:
    """Returns the weight that was given to `pack_gated`, `[2 * size, in_features]`."""
    weight = unpack_panels(packed, len(packed) * PANEL)
    return weight.view(-1, 2, _HALF, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
