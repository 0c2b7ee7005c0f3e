"""`round_to_groups`: rounds the rows of a matrix to integers of few bits, group by group."""

from __future__ import annotations

from torch import Tensor

from ..weights.codes import Codes

__all__ = ["round_to_groups"]


def round_to_groups(weight: Tensor, bits: int, group_size: int) -> Codes:
    """Rounds a matrix to the nearest integers without zero points, relative to the largest number of each group.

    Args:
        weight: `[rows, columns]`, any floating-point dtype.
        bits: Bits of an integer, from 2 to 8.
        group_size: Neighbouring columns that share a scale; it divides the columns.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    most = (1 << (bits - 1)) - 1
    scales = groups.abs().amax(-1) / most
    values = (groups / scales.clamp_min(1e-30).unsqueeze(-1)).round_().clamp_(-most - 1, most)
    return Codes(values.flatten(1).char(), scales)
