"""`KVScales`: the scales by which an attention layer stores its keys and values in a KV cache of 8 bits.

A key or a value is divided by the scale of its head before it is rounded, and multiplied by it when it is read.

8-bit floats reach 448, and larger numbers would be clamped. Within its range the format has the same relative error
everywhere. So a scale has to bring a head into the range, and the place within the range does not matter. The scales
that are chosen here are powers of two, by which a division is exact. Of heads that fit without a scale, all numbers but
the smallest then keep the value that they have without one.

8-bit integers reach 127, and their steps are equally wide. So the scale is the width of a step, as small as the margin
allows. Scales of checkpoints are those of 8-bit floats: they say too little about the numbers of a head to make steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..parallel.shard import Shard
from .weight_slot import WeightSlot

__all__ = ["KVScales"]

LARGEST: Mapping[torch.dtype, float] = MappingProxyType({torch.float8_e4m3fn: 448.0, torch.int8: 127.0})
"""Number types of a KV cache that has scales -> the largest number."""

MARGIN = 2.0
"""Least ratio of the largest number that can be stored to the largest that was seen. Rotation by another position may
move all of a pair of numbers into one of the two, which takes a factor of 1.4; other tokens have the rest, and what
rounding up to a power of two adds."""

MIN_EXPONENT, MAX_EXPONENT = -16, 64
"""Bounds of the exponents of scales. A head of nearly no size gets no smaller scale, so that it may grow."""


class KVScales(nn.Module):
    """The scales of the keys and values of one attention layer. They are 1 until a checkpoint or `choose` sets them.

    Args:
        heads: The key and value heads of this rank among those of the model, K heads.
        device: Device of the scales.

    Attributes:
        table: `[2, K]` float32, the scale of each head's keys, then of its values.
        is_given: `[2, 1]` bool, whether the checkpoint has given the scales of keys, then those of values.
    """

    table: Tensor
    is_given: Tensor

    def __init__(self, heads: Shard, device: torch.device) -> None:
        super().__init__()
        table = torch.ones((2, heads.length), dtype=torch.float32, device=device)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("is_given", torch.zeros((2, 1), dtype=torch.bool, device=device), persistent=False)
        self._heads = heads

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields the weight slots `k_scale` and `v_scale`, of one scale for each head of the model or one for all."""

        def encode(scales: Tensor) -> tuple[Tensor, Tensor]:
            return scales.reshape(-1).expand(self._heads.length), torch.ones(1, dtype=torch.bool)

        for row, name in enumerate(("k_scale", "v_scale")):
            targets = (self.table[row], self.is_given[row])
            yield name, WeightSlot(targets, encode, parts=(self._heads,), optional=True, broadcasts=True)

    def of(self, cache: Tensor) -> Tensor | None:
        """Returns the table if a cache is of 8 bits; None for any other cache, which has no scales."""
        return self.table if cache.dtype in LARGEST else None

    def forget_given(self) -> None:
        """Forgets the scales that a checkpoint has given."""
        self.is_given.fill_(False)
        self.table.fill_(1.0)

    def choose(self, peaks: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        """Sets the scales that no checkpoint has given, so that numbers `MARGIN` times as large as the peaks fit.

        Args:
            peaks: `[2, K]` float32, the largest absolute number of the keys of each head, then of its values. A head
                whose peak is 0, infinite or NaN keeps a scale of 1.
            dtype: Number type of the cache, a key of `LARGEST`.
        """
        fitting = peaks * (MARGIN / LARGEST[dtype])
        if dtype.is_floating_point:
            _, exponents = torch.frexp(fitting)  # 2 ** exponent is the next power of two
            bits = (exponents.clamp(MIN_EXPONENT, MAX_EXPONENT).int() + 127) << 23  # of float32
            fitting = bits.view(torch.float32)
        chosen = torch.where((peaks > 0) & peaks.isfinite(), fitting, 1.0)
        self.table.copy_(torch.where(self.is_given, self.table, chosen))
