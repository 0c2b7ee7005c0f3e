"""Positions of a prompt that come as embeddings: `EmbeddedSpan`."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedSpan:
    """Consecutive positions of a sequence whose embeddings are given; the model looks up only the other tokens.

    Attributes:
        start: First position.
        embeddings: `[num_positions, embedding_size]`, contiguous, in the model's dtype, on the CPU; never changed.
    """

    start: int
    embeddings: Tensor

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + len(self.embeddings)

    def within(self, start: int, end: int) -> range:
        """Returns the positions of the span between two positions; empty if there are none."""
        return range(max(start, self.start), min(end, self.end))

    def rows(self, positions: range) -> Tensor:
        """Returns the embeddings of positions of the span, a view."""
        return self.embeddings[positions.start - self.start : positions.stop - self.start]

    def name_content(self, start: int, end: int) -> bytes:
        """Returns bytes that name the embeddings between two positions, and where they lie there."""
        positions = self.within(start, end)
        if not positions:
            return b""
        content = blake2b(self.rows(positions).view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
        return array("i", (positions.start - start, len(positions))).tobytes() + content
