"""`round_to_groups`: rounds the rows of a matrix to integers of few bits, group by group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights.codes import Codes

__all__ = ["round_to_groups"]


def round_to_groups(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.float32) -> Codes:
    """Rounds a matrix to the nearest integers without zero points.

    The number of the largest magnitude in a group becomes -2^(bits - 1), the far end of the integers, and the scale may
    be negative for that. So all integers are used: in 4 bits the error is 12 % smaller than if that number became 7.

    Args:
        weight: `[rows, columns]`, any floating-point dtype.
        bits: Bits of an integer, from 2 to 8.
        group_size: Neighbouring columns that share a scale; it divides the columns.
        dtype: Number type in which the scales are kept. They are rounded to it before the numbers are divided by them.
    """
    groups, end = weight.float().unflatten(1, (-1, group_size)), 1 << (bits - 1)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest / -end).to(dtype).float()
    values = (groups / scales.where(scales != 0, 1)).round_().clamp_(-end, end - 1)
    return Codes(values.flatten(1).char(), scales.squeeze(-1))
