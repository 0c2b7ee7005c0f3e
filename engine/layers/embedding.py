"""Embeddings: `TokenEmbedding` of token ids, `LearnedPositions` and `TokenTypes` in models that learn them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...kernels import embedding
from ..parallel.shard import Shard
from .weight_slot import WeightSlot

__all__ = [
    "LearnedPositions",
    "NoPositions",
    "NoTokenTypes",
    "SharedTokenEmbedding",
    "TokenEmbedding",
    "TokenTypes",
]


class TokenEmbedding(nn.Module):
    """Looks up the embeddings of token ids in a table.

    Args:
        num_embeddings: Number of rows of the table.
        size: Length of a row.
        scale: Factor on the rows that are looked up, rounded to the dtype.
        dtype: Number type of the table.
        device: Device of the table. Its memory is not initialised.
    """

    def __init__(
        self, num_embeddings: int, size: int, *, scale: float = 1.0, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.scale = _rounded(scale, dtype)
        self.weight = nn.Parameter(torch.empty(num_embeddings, size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Maps `token_ids` `[num_tokens]` int64 to `[num_tokens, size]`."""
        return _scaled(embedding(token_ids, self.weight), self.scale)


class SharedTokenEmbedding(nn.Module):
    """Looks up the embeddings of token ids in a table whose rows are divided among several ranks.

    Each rank looks up the tokens whose rows it has and takes zeros for all others; then the ranks add up the results.

    Args:
        rows: The rows of this rank.
        size: Length of a row.
        reduce: Sums the embeddings over the ranks.
        scale: As in `TokenEmbedding`.
        dtype: Number type of the table.
        device: Device of the table. Its memory is not initialised, unless the shard is shorter than the room it gets
            (`Shard.room`): then the table is zeros.
    """

    def __init__(
        self,
        rows: Shard,
        size: int,
        reduce: Callable[[Tensor], Tensor],
        *,
        scale: float = 1.0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        make = torch.empty if rows.length == rows.room else torch.zeros
        self.weight = nn.Parameter(make(rows.room, size, dtype=dtype, device=device), requires_grad=False)
        self.rows = rows
        self.scale = _rounded(scale, dtype)
        self.reduce = reduce

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields `weight` and its weight slot: this rank's rows of the checkpoint's table."""
        table, padding = self.weight[: self.rows.length], self.weight[self.rows.length :]
        parts = (self.rows, Shard(table.shape[1]))
        yield "weight", WeightSlot((table,), parts=parts, padding=(padding,), by_row=True)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Maps `token_ids` `[num_tokens]` int64 to `[num_tokens, size]`."""
        local = token_ids - self.rows.start
        is_elsewhere = (local < 0) | (local >= self.rows.length)
        found = embedding(local.masked_fill_(is_elsewhere, 0), self.weight)
        return _scaled(self.reduce(found.masked_fill_(is_elsewhere.unsqueeze(-1), 0)), self.scale)


class LearnedPositions(nn.Module):
    """Adds a learned vector for each position.

    Args:
        max_positions: Number of positions for which the model has a vector.
        size: Length of a vector.
        offset: Number of leading rows of the checkpoint's table that belong to no position.
        dtype: Number type of the table.
        device: Device of the table. Its memory is not initialised.
    """

    def __init__(self, max_positions: int, size: int, *, offset: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        rows = torch.empty(max_positions + offset, size, dtype=dtype, device=device)
        self.offset = offset
        self.weight = nn.Parameter(rows, requires_grad=False)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Returns `hidden` `[num_tokens, size]` plus the vectors of `positions` `[num_tokens]`."""
        return hidden + embedding(positions, self.weight[self.offset :])


class NoPositions(nn.Module):
    """Adds nothing, in models that do not add positions to the embeddings."""

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Returns `hidden` unchanged."""
        return hidden


class TokenTypes(nn.Module):
    """Adds a learned vector for the type of each token.

    Args:
        num_types: Number of types.
        size: Length of a vector.
        dtype: Number type of the table.
        device: Device of the table. Its memory is not initialised.
    """

    def __init__(self, num_types: int, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_types, size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, hidden: Tensor, token_types: Tensor | None) -> Tensor:
        """Returns `hidden` `[num_tokens, size]` plus the vectors of `token_types` `[num_tokens]`; None is type 0."""
        return hidden + (self.weight[0] if token_types is None else embedding(token_types, self.weight))


class NoTokenTypes(nn.Module):
    """Adds nothing, in models whose tokens have no types."""

    def forward(self, hidden: Tensor, token_types: Tensor | None) -> Tensor:
        """Returns `hidden` unchanged."""
        return hidden


def _rounded(scale: float, dtype: torch.dtype) -> float:
    """Returns the scale rounded to the dtype; for example sqrt(3072) = 55.4256 is 55.5 in bfloat16."""
    return torch.tensor(scale, dtype=dtype).item()


def _scaled(rows: Tensor, scale: float) -> Tensor:
    """Returns the rows times the scale, in the dtype of the rows."""
    return rows if scale == 1 else rows * scale
