"""`GroupEmbedding`: a token embedding whose table is integers in groups; `TiedGroupHead`: the head that shares it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..layers import LinearBase, WeightSlot
from ..parallel.shard import Shard
from .group_linear import GroupLinear

__all__ = ["GroupEmbedding", "TiedGroupHead"]


class GroupEmbedding(nn.Module):
    """Looks up the embeddings of token ids in a table that is integers in groups, and dequantises their rows.

    Args:
        table: The table, as a matrix with a row for each token.
        rows: The tokens whose rows this rank has.
        reduce: Sums the embeddings over the ranks; None if this rank has all rows.
        scale: Factor on the rows that are looked up, rounded to the dtype.
        dtype: Number type of the embeddings.
    """

    def __init__(
        self,
        table: GroupLinear,
        rows: Shard,
        reduce: Callable[[Tensor], Tensor] | None,
        *,
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.table = table
        self._rows = rows
        self._reduce = reduce
        self._scale = torch.tensor(scale, dtype=dtype).item()

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields the weight slot of the table under the name that a plain table has."""
        yield from self.table.slots()

    def forward(self, token_ids: Tensor) -> Tensor:
        """Maps `token_ids` `[num_tokens]` int64 to `[num_tokens, size]`."""
        if self._reduce is None:
            return self._scaled(self.table.rows(token_ids))
        local = token_ids - self._rows.start
        is_elsewhere = (local < 0) | (local >= self._rows.length)
        found = self.table.rows(local.masked_fill_(is_elsewhere, 0))
        return self._scaled(self._reduce(found.masked_fill_(is_elsewhere.unsqueeze(-1), 0)))

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self._scale == 1 else rows * self._scale


class TiedGroupHead(LinearBase):
    """Multiplies by the table of a `GroupEmbedding`.

    Args:
        table: The table.
    """

    def __init__(self, table: GroupLinear) -> None:
        super().__init__()
        self.table = table

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields the weight slot of the table, which a checkpoint may also fill under the name of the head."""
        yield from self.table.slots()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[..., in_features]` to `[..., out_features]` in the same dtype."""
        return self.table(x)

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward` with a result in float32, which is not rounded to the dtype of `x` in between."""
        return self.table.forward_float32(x)
