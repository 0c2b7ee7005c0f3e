"""`EmbeddedSpan`: positions of a prompt whose embeddings are given instead of tokens."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedSpan:
    """Consecutive positions of a sequence whose embeddings are given. The model looks up embeddings of other positions.

    Attributes:
        start: First position of the span.
        embeddings: `[num_positions, embedding_size]`, contiguous, in the model's dtype, on the CPU; never changed.
    """

    start: int
    embeddings: Tensor

    @property
    def end(self) -> int:
        """The position after the last position of the span."""
        return self.start + len(self.embeddings)

    def within(self, start: int, end: int) -> range:
        """Returns the positions of the span that are at least `start` and less than `end`; the range may be empty."""
        return range(max(start, self.start), min(end, self.end))

    def rows(self, positions: range) -> Tensor:
        """Returns the `[len(positions), embedding_size]` embeddings of positions of the span, as a view."""
        return self.embeddings[positions.start - self.start : positions.stop - self.start]

    def name_content(self, start: int, end: int) -> bytes:
        """Returns bytes that identify the embeddings between two positions, for the hash of a block.

        The bytes hold the place of the embeddings in the block and a hash of their values. They are empty if no
        position of the span lies between the two.

        Args:
            start: First position of the block.
            end: Position after the last of the block.
        """
        positions = self.within(start, end)
        if not positions:
            return b""
        content = blake2b(self.rows(positions).view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
        return array("i", (positions.start - start, len(positions))).tobytes() + content
