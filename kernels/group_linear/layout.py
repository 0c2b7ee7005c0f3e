"""The memory layout of the codes of a weight for `group_linear`: blocks of 32 halves of 16 bits, two halves a word.

    half[n, 32 · block + m] = Σ_i  code[n, (512 / bits) · block + 32 · i + m] · 2**(bits · i)
    0 <= m < 32,   0 <= i < 16 / bits

So the codes at place i of the halves of a block belong to 32 neighbouring inputs, which is no more than the smallest
group. A GPU's matrix unit takes two neighbouring 16-bit numbers in a register: a kernel makes both out of one word by
one shift and one mask, moves none of them to another thread, and reads the inputs where they are.

A row ends with a whole block, which is padded with zeros: 128 codes of 4 bits, or 64 of 8 bits, are 16 words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLOCK_HALVES", "GROUP_UNIT", "by_groups", "codes_per_block", "num_words", "pack_codes", "unpack_codes"]

BLOCK_HALVES = 32
GROUP_UNIT = BLOCK_HALVES
"""The size of a group is a multiple of this many inputs, or all of them. The plain body takes any size."""


def codes_per_block(bits: int) -> int:
    """Returns the number of codes in a block, which is 64 bytes long."""
    return BLOCK_HALVES * 16 // bits


def num_words(in_features: int, bits: int) -> int:
    """Returns the number of words of 32 bits in a packed row."""
    return -(-in_features // codes_per_block(bits)) * (BLOCK_HALVES // 2)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs the codes of a weight for `group_linear`.

    Args:
        codes: `[out_features, in_features]` uint8, each less than `2**bits`.
        bits: 4 or 8.

    Returns:
        `[out_features, num_words]` int32; num_words is `in_features * bits / 32`, rounded up to a multiple of 16.
    """
    codes = F.pad(codes, (0, -codes.shape[1] % codes_per_block(bits)))
    places = codes.view(len(codes), -1, 16 // bits, BLOCK_HALVES).unbind(2)
    halves = places[0].to(torch.int16)
    for i, place in enumerate(places[1:], 1):
        halves |= place.to(torch.int16) << (bits * i)
    return halves.flatten(1).view(torch.int32)


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Returns the codes that were given to `pack_codes`, `[out_features, in_features]` uint8."""
    halves = packed.view(torch.int16).view(len(packed), -1, 1, BLOCK_HALVES)
    shifts = torch.arange(0, 16, bits, dtype=torch.int16, device=packed.device)[:, None]
    codes = halves >> shifts & (1 << bits) - 1
    return codes.flatten(1)[:, :in_features].to(torch.uint8)


def by_groups(scales: Tensor) -> Tensor:
    """Returns scales, or zeros, `[out_features, num_groups]`, with those of a group next to each other in memory."""
    return scales.t().contiguous().t()
