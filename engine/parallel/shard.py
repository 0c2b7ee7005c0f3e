"""Which part of a tensor's dimension a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Dimension", "Shard", "as_shard"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` parts of a dimension, all of one size but for what is missing at the end.

    Attributes:
        size: Of the whole dimension.
        index: Which part.
        count: How many parts there are; 1 is the whole.
    """

    size: int
    index: int = 0
    count: int = 1

    @property
    def room(self) -> int:
        """Size of a part that is full."""
        return -(-self.size // self.count)

    @property
    def start(self) -> int:
        """Where the part begins in the whole."""
        return min(self.index * self.room, self.size)

    @property
    def length(self) -> int:
        """Size of this part: `room`, or less at the end of the dimension."""
        return min(self.room, self.size - self.start)

    def times(self, factor: int) -> Shard:
        """Returns the same part of a dimension in which every element is `factor` elements: heads to rows, say."""
        return Shard(self.size * factor, self.index, self.count)


Dimension: TypeAlias = int | Shard
"""A dimension of a weight: whole, or a part of it."""


def as_shard(dimension: Dimension) -> Shard:
    """Returns a dimension as a shard: a number is a whole one."""
    return Shard(dimension) if isinstance(dimension, int) else dimension
