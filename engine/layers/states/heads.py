"""`StateHeads`: the heads of a recurrence that one rank computes."""

from __future__ import annotations

from dataclasses import dataclass

from ...parallel.shard import Shard

__all__ = ["StateHeads"]


@dataclass(frozen=True, slots=True)
class StateHeads:
    """The heads of a recurrence that one rank computes.

    Attributes:
        heads: The heads of this rank among those of the model.
        head_dim: Size of the input and the output of a head.
        groups: The groups of these heads.
        state_size: Size of the two vectors of a group.
    """

    heads: Shard
    head_dim: int
    groups: Shard
    state_size: int

    @property
    def inner(self) -> Shard:
        """This rank's part of the inputs of all heads."""
        return self.heads.times(self.head_dim)

    @property
    def vectors(self) -> Shard:
        """This rank's part of one vector of all groups."""
        return self.groups.times(self.state_size)
