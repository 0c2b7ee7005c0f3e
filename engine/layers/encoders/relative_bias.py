"""`RelativeBias`: learned amounts that are added to attention scores by the distance of query and key."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ...parallel.shard import Shard
from ..weight_slot import WeightSlot

__all__ = ["DistanceBias", "RelativeBias"]

DistanceBias: TypeAlias = Callable[[], Tensor]
"""Returns the amounts by distance, `[num_heads, 2 * max_distance + 1]` float32, as `kernels.varlen_attention` reads
them."""


class RelativeBias(nn.Module):
    """The amounts of all buckets of distances (Raffel et al., 2020, arXiv:1910.10683), one table for all layers.

    Args:
        heads: The heads of this rank.
        num_buckets: Number of buckets, half of them for keys after the query.
        max_distance: Distance from which on all keys are in the last bucket.
        dtype: Number type of the table.
        device: Device of the table. Its memory is not initialised.
    """

    buckets: Tensor

    def __init__(
        self, heads: Shard, num_buckets: int, max_distance: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self._parts = (Shard(num_buckets), heads)
        self.weight = nn.Parameter(
            torch.empty(num_buckets, heads.length, dtype=dtype, device=device), requires_grad=False
        )
        buckets = [_bucket(distance, num_buckets, max_distance) for distance in range(-max_distance, max_distance + 1)]
        self.register_buffer("buckets", torch.tensor(buckets, device=device), persistent=False)

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields `weight` and its weight slot: the columns of this rank's heads."""
        yield "weight", WeightSlot((self.weight,), parts=self._parts)

    def forward(self) -> Tensor:
        """Returns the amounts by distance of each head, `[num_heads, 2 * max_distance + 1]` float32."""
        return self.weight[self.buckets].float().mT.contiguous()


def _bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """Returns the bucket of a key `distance` tokens after the query (before it, if negative)."""
    half = num_buckets // 2
    first, distance = (half if distance > 0 else 0), abs(distance)
    num_exact = half // 2
    if distance < num_exact:
        return first + distance
    # This is computed in float32 as the models were trained: another rounding would move a distance to the next bucket.
    growth = torch.log(torch.tensor(distance, dtype=torch.float32) / num_exact) / math.log(max_distance / num_exact)
    return first + min(half - 1, num_exact + int(growth * (half - num_exact)))
