"""Which rank this process is, and what it does together with the others.

A model of `tp_size * pp_size` ranks is cut twice. Its layers form `pp_size` stages (pipeline parallelism), and the
matrices of a stage are shared by `tp_size` ranks (tensor parallelism). Rank numbers run through a stage first.

A context is passed to whatever must know; there is no current one. The default is one process that is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .collectives import Collectives
from .shard import Shard

__all__ = ["SINGLE", "ParallelContext", "StageLink", "World"]


class StageLink(Protocol):
    """How a stage's ranks pass tensors on: each to the rank of the same place in the next stage."""

    def send(self, tensor: Tensor) -> None:
        """Sends a tensor to the next stage; does not wait until it is there."""
        ...

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns the next tensor from the stage before."""
        ...

    def close(self) -> None:
        """Ends the connections."""
        ...


class World(Protocol):
    """All ranks."""

    def smallest(self, value: int) -> int:
        """Returns the smallest of all ranks' values."""
        ...


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """This rank among the others.

    Attributes:
        tp_size: Ranks of a stage.
        tp_rank: Which of them this is.
        pp_size: Stages.
        pp_rank: Which of them this is in.
        tensor: Collectives of the stage's ranks; None if there is one rank, or nothing is computed.
        stages: To the next stage and from the one before; None likewise.
        world: All ranks; None likewise.
    """

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    tensor: Collectives | None = None
    stages: StageLink | None = None
    world: World | None = None

    @classmethod
    def of_rank(cls, rank: int, tp_size: int, pp_size: int) -> ParallelContext:
        """Returns the place of a rank, without the means to reach the others."""
        assert 0 <= rank < tp_size * pp_size
        return cls(tp_size, rank % tp_size, pp_size, rank // tp_size)

    @property
    def rank(self) -> int:
        """Number among all ranks; rank 0 has the engine."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def num_ranks(self) -> int:
        """Ranks of the engine."""
        return self.tp_size * self.pp_size

    @property
    def is_first_stage(self) -> bool:
        """Whether this stage embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this stage computes logits and draws tokens."""
        return self.pp_rank == self.pp_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank is the one whose results count: the first of the last stage."""
        return self.is_last_stage and self.tp_rank == 0

    def shard(self, size: int) -> Shard:
        """Returns this rank's part of a dimension that its stage shares."""
        return Shard(size, self.tp_rank, self.tp_size)

    def kv_shard(self, num_kv_heads: int) -> Shard:
        """Returns this rank's key and value heads; with fewer heads than ranks, neighbours hold the same."""
        count = min(self.tp_size, num_kv_heads)
        return Shard(num_kv_heads, self.tp_rank * count // self.tp_size, count)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Returns the sum of the tensors of the stage's ranks, in place of this one's."""
        return tensor if self.tensor is None else self.tensor.all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the columns of all ranks of the stage: from `[rows, columns]` to `[rows, tp_size * columns]`."""
        if self.tensor is None:
            return tensor
        return self.tensor.all_gather(tensor).transpose(0, 1).flatten(1)

    def smallest(self, value: int) -> int:
        """Returns the smallest of all ranks' values."""
        return value if self.world is None else self.world.smallest(value)


SINGLE = ParallelContext()
"""One process, one device, the whole model."""
