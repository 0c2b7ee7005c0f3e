"""`unpack_bits`: reads numbers of a few bits that are packed one after another, the first one in the lowest bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["VALUES_TOGETHER", "unpack_bits"]

VALUES_TOGETHER = 32
"""So many numbers of any width fill whole 32-bit words, and begin and end with a word."""


def unpack_bits(words: Tensor, bits: int) -> Tensor:
    """Returns the numbers of rows of packed words.

    A number may begin in one word and end in the next one, as numbers of 3 bits do.

    Args:
        words: `[num_rows, num_words]` int32.
        bits: Width of a number, 1 to 8.

    Returns:
        `[num_rows, num_words * 32 // bits]` uint8.
    """
    if not words.numel():
        return torch.empty(len(words), words.shape[1] * 32 // bits, dtype=torch.uint8)
    stream = words.contiguous().view(torch.uint8)
    num_bytes = bits // math.gcd(bits, 8)  # The fewest bytes that hold whole numbers.
    num_chunks = stream.shape[1] // num_bytes
    chunks = stream[:, : num_chunks * num_bytes].unflatten(1, (num_chunks, num_bytes))
    joined = chunks[..., 0] if num_bytes == 1 else _join(chunks)
    shifts = torch.arange(0, 8 * num_bytes, bits, dtype=joined.dtype)
    return ((joined.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1)


def _join(chunks: Tensor) -> Tensor:
    """Returns the integers whose bytes, the lowest first, are the last dimension."""
    places = torch.arange(chunks.shape[-1]) * 8
    return (chunks.long() << places).sum(-1)
