"""The memory layout of a weight for `packed_group_linear`: panels of 32 outputs, in the order of reading.

    codes[panel, block, pair, half, lane, i] = Σ_f q[32 · panel + 8 · (half · fields + f) + lane, k] · 2^(bits · f)
    k = size · block + 2 · pair + i            0 <= i < 2, 0 <= lane < 8, fields = 16 / bits

A block is the part of a group for which the kernel rounds the inputs together: 16, 32, 64 or 128 of them. A 16-bit lane
has the codes of several outputs, so that one shift and one mask take 16 of them out of a vector.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..group_linear import unpack_codes

__all__ = ["PackedGroups", "can_pack_groups", "pack_groups", "unpack_groups", "unpack_rows"]

PANEL = 32
LANES = 8
MIN_BLOCK, MAX_BLOCK = 16, 128

ROWS_AT_ONCE = 512
"""Rows whose codes are spread out in memory at once, while they are packed."""


class PackedGroups(NamedTuple):
    """A weight in panels of 32 outputs. The last panel is padded with zeros.

    Attributes:
        codes: `[num_panels, num_blocks, block_size / 2, bits / 4, 8, 2]` int16.
        scales: `[num_panels, num_blocks, 32]`, float32, bfloat16 or float16.
        zeros: `[num_panels, num_blocks, 32]` uint8; None for 2^(bits - 1).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def can_pack_groups(in_features: int, group_size: int) -> bool:
    """Returns whether `pack_groups` supports the groups of a weight: multiples of 16 inputs, and whole groups only."""
    return group_size % MIN_BLOCK == 0 and in_features % group_size == 0


def pack_groups(weight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, bits: int) -> PackedGroups:
    """Rearranges a weight of `group_linear` into panels, in its own memory where it is as large as they are.

    Args:
        weight: The codes as `group_linear.pack_codes` returns them, contiguous. They are gone afterwards.
        scales: `[out_features, num_groups]`, float32, bfloat16 or float16.
        zeros: `[out_features, num_groups]` uint8, or None for 2^(bits - 1).
        in_features: Columns of the weight.
        bits: 4 or 8.
    """
    group_size = in_features // scales.shape[1]
    block_size = math.gcd(group_size, MAX_BLOCK)
    shape = (-(-len(weight) // PANEL), in_features // block_size, block_size // 2, bits // 4, LANES, 2)
    halves = weight.view(torch.int16)
    codes = halves.view(shape) if halves.numel() == math.prod(shape) else torch.empty(shape, dtype=torch.int16)
    for first in range(0, len(weight), ROWS_AT_ONCE):
        rows = unpack_codes(weight[first : first + ROWS_AT_ONCE], bits, in_features)
        _pack_codes(rows, codes[first // PANEL : (first + ROWS_AT_ONCE) // PANEL], bits)
    repeats = group_size // block_size
    return PackedGroups(codes, _by_panel(scales, repeats), None if zeros is None else _by_panel(zeros, repeats))


def _pack_codes(rows: Tensor, panels: Tensor, bits: int) -> None:
    """Writes rows of codes, one in each uint8, to their panels."""
    num_panels, num_blocks, num_pairs, num_halves = panels.shape[:4]
    rows = F.pad(rows, (0, 0, 0, num_panels * PANEL - len(rows)))
    rows = rows.view(num_panels, num_halves, -1, LANES, num_blocks, num_pairs, 2)
    panels.zero_()
    for field in range(rows.shape[2]):
        panels |= rows[:, :, field].permute(0, 3, 4, 1, 2, 5).to(torch.int16) << (bits * field)


def _by_panel(numbers: Tensor, repeats: int) -> Tensor:
    """Maps numbers of groups `[out_features, num_groups]` to `[num_panels, num_blocks, 32]`."""
    numbers = F.pad(numbers.repeat_interleave(repeats, dim=1), (0, 0, 0, -len(numbers) % PANEL))
    return numbers.reshape(-1, PANEL, numbers.shape[1]).transpose(1, 2).contiguous()


def unpack_groups(packed: PackedGroups, dtype: torch.dtype) -> Tensor:
    """Returns the weight that was packed, with the rows of the padding, `[num_panels * 32, in_features]` in a dtype."""
    bits = packed.codes.shape[3] * 4
    fields = [(packed.codes >> (bits * field)) & (2**bits - 1) for field in range(16 // bits)]
    # [panel, block, pair, half, field, lane, i] -> [panel, block, pair, i, output]
    codes = torch.stack(fields, dim=4).flatten(3, 5).transpose(3, 4).flatten(2, 3)
    zeros = 2 ** (bits - 1) if packed.zeros is None else packed.zeros[:, :, None].to(dtype)
    weight = (codes.to(dtype) - zeros) * packed.scales[:, :, None].to(dtype)
    return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def unpack_rows(packed: PackedGroups, index: Tensor) -> Tensor:
    """Returns rows of the weight that was packed, `[len(index), in_features]` float32.

    Args:
        packed: The weight.
        index: `[num_rows]` int64.
    """
    bits = packed.codes.shape[3] * 4
    panel, output = index // PANEL, index % PANEL
    vector, lane = output // LANES, output % LANES
    fields = 16 // bits
    shift = (vector % fields * bits).to(torch.int16)
    codes = packed.codes[panel, :, :, vector // fields, lane].flatten(2)  # [row, block, input]
    codes = (codes >> shift[:, None, None]) & (2**bits - 1)
    zeros = 2 ** (bits - 1) if packed.zeros is None else packed.zeros[panel, :, output, None].float()
    return ((codes.float() - zeros) * packed.scales[panel, :, output, None].float()).flatten(1)
