"""`Shard`: the part of a dimension of a tensor that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Dimension", "Shard", "as_shard"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` parts of a dimension. All parts have equal size, but the last ones may be shorter or empty.

    Attributes:
        size: Size of the whole dimension.
        index: Index of the part.
        count: Number of parts; 1 means the whole dimension.
    """

    size: int
    index: int = 0
    count: int = 1

    @property
    def room(self) -> int:
        """Size of a full part."""
        return -(-self.size // self.count)

    @property
    def start(self) -> int:
        """First index of the part in the whole dimension."""
        return min(self.index * self.room, self.size)

    @property
    def length(self) -> int:
        """Size of this part: `room`, or less at the end of the dimension."""
        return min(self.room, self.size - self.start)

    def times(self, factor: int) -> Shard:
        """Returns the same part of a dimension that is `factor` times as long, such as rows of a matrix for heads."""
        return Shard(self.size * factor, self.index, self.count)


Dimension: TypeAlias = int | Shard
"""A dimension of a weight: an integer is a whole dimension, a `Shard` is a part of one."""


def as_shard(dimension: Dimension) -> Shard:
    """Returns a dimension as a shard; an integer becomes a shard with the whole dimension."""
    return Shard(dimension) if isinstance(dimension, int) else dimension
