"""`ParallelContext`: the place of this rank among all ranks, and the operations that ranks do together.

A model with `tp_size * pp_size` ranks is cut twice. Its layers form `pp_size` pp stages (pipeline parallelism), and the
`tp_size` ranks of a pp stage share its matrices (tensor parallelism). Rank numbers run through a pp stage first.

A context is an argument of every function that needs one; no global context exists. The default is a single process.
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
    """Passes tensors from a rank to the rank with the same `tp_rank` in the next pp stage."""

    def send(self, tensor: Tensor) -> None:
        """Sends a tensor to the next pp stage; does not wait until it has arrived."""
        ...

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns the next tensor from the previous pp stage."""
        ...

    def close(self) -> None:
        """Closes the connections."""
        ...


class World(Protocol):
    """Finds the smallest of the values of all ranks of the engine. Each rank must call its one method."""

    def smallest(self, value: int) -> int:
        """Waits until each rank has called with its value, and returns the smallest of these values."""
        ...


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """The place of this rank among all ranks, and its connections to them.

    Attributes:
        tp_size: Number of ranks of a pp stage.
        tp_rank: Index of this rank in its pp stage.
        pp_size: Number of pp stages.
        pp_rank: Index of this rank's pp stage.
        tensor: Collectives of the ranks of this pp stage; None if it has one rank.
        stages: Link to the next and the previous pp stage; None if there is one pp stage.
        world: Operation over all ranks; None if the engine has one rank. A context without connections, which only
            names a place (`of_rank`), has None for all three.
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
        """Returns the context of a rank without connections to the other ranks."""
        assert 0 <= rank < tp_size * pp_size
        return cls(tp_size, rank % tp_size, pp_size, rank // tp_size)

    @property
    def rank(self) -> int:
        """Number of this rank among all ranks; rank 0 has the engine."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the engine."""
        return self.tp_size * self.pp_size

    @property
    def is_first_stage(self) -> bool:
        """Whether this pp stage embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this pp stage computes logits and draws tokens."""
        return self.pp_rank == self.pp_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank reports the results of a step: the first rank of the last pp stage does."""
        return self.is_last_stage and self.tp_rank == 0

    def shard(self, size: int) -> Shard:
        """Returns this rank's part of a dimension of length `size`, which the ranks of a pp stage divide."""
        return Shard(size, self.tp_rank, self.tp_size)

    def kv_shard(self, num_kv_heads: int) -> Shard:
        """Returns this rank's key and value heads. With fewer heads than ranks, neighbouring ranks share a head."""
        count = min(self.tp_size, num_kv_heads)
        return Shard(num_kv_heads, self.tp_rank * count // self.tp_size, count)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replaces a contiguous tensor by its sum over the ranks of the pp stage and returns it."""
        return tensor if self.tensor is None else self.tensor.all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates the columns of the ranks of the pp stage: `[rows, columns]` to `[rows, tp_size * columns]`."""
        if self.tensor is None:  # A rehearsal has no other ranks; its shapes are those of all.
            return tensor if self.tp_size == 1 else tensor.repeat(1, self.tp_size)
        return self.tensor.all_gather(tensor).transpose(0, 1).flatten(1)

    def best(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the largest of the ranks' values and the id that belongs to it; of equal ones that of the first rank.

        Args:
            values: `[num_rows]` float32, a value of this rank for each row.
            ids: `[num_rows]` int32, the ids of these values.

        Returns:
            Values `[num_rows]` float32 and ids `[num_rows]` int32. NaN counts as the largest value.
        """
        if self.tensor is None:
            return values, ids
        gathered = self.tensor.all_gather(torch.stack((values.view(torch.int32), ids)))
        largest, rank = gathered[:, 0].view(torch.float32).max(0, keepdim=True)
        return largest[0], gathered[:, 1].gather(0, rank)[0]

    def smallest(self, value: int) -> int:
        """Waits until each rank has called with its value, and returns the smallest of these values."""
        return value if self.world is None else self.world.smallest(value)

    def agree(self, is_so: bool) -> bool:
        """Waits until each rank has called with its answer, and returns whether all answers are True."""
        return bool(self.smallest(int(is_so)))


SINGLE = ParallelContext()
"""The context of one process with one device, which has the whole model."""
