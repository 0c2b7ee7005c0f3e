"""Embeddings: of token ids, and of positions in models that learn them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...kernels import embedding
from ..parallel.shard import Shard
from .slots import Slot

__all__ = ["LearnedPositions", "NoPositions", "SharedTokenEmbedding", "TokenEmbedding"]


class TokenEmbedding(nn.Module):
    """Looks token ids up.

    Args:
        num_embeddings: Rows of the table.
        size: Length of a row.
        scale: Factor on the rows that are looked up, rounded to the dtype.
        dtype: Of the table.
        device: Of the table. Its memory is not initialised.
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
    """Looks token ids up in a table that several ranks share: each has some of the rows, and zeros for all others.

    Args:
        rows: Those of this rank.
        size: Length of a row.
        reduce: Adds up what the ranks have found.
        scale: As in `TokenEmbedding`.
        dtype: Of the table.
        device: Of the table. Its memory is not initialised, but for rows that this rank has no token for.
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

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """Yields every (name, slot) a checkpoint fills."""
        table, padding = self.weight[: self.rows.length], self.weight[self.rows.length :]
        yield "weight", Slot((table,), parts=(self.rows, Shard(table.shape[1])), padding=(padding,))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Maps `token_ids` `[num_tokens]` int64 to `[num_tokens, size]`."""
        local = token_ids - self.rows.start
        is_elsewhere = (local < 0) | (local >= self.rows.length)
        found = embedding(local.masked_fill_(is_elsewhere, 0), self.weight)
        return _scaled(self.reduce(found.masked_fill_(is_elsewhere.unsqueeze(-1), 0)), self.scale)


class LearnedPositions(nn.Module):
    """Adds a learned vector per position.

    Args:
        max_positions: Positions the model knows.
        size: Length of a vector.
        offset: Leading rows of the table that belong to no position; the checkpoint has them.
        dtype: Of the table.
        device: Of the table. Its memory is not initialised.
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
    """Stands where positions reach the model another way: the embedding stays as it is."""

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Returns `hidden`."""
        return hidden


def _rounded(scale: float, dtype: torch.dtype) -> float:
    """Returns the scale as the dtype holds it: sqrt(3072) = 55.4256 is 55.5 in bfloat16."""
    return torch.tensor(scale, dtype=dtype).item()


def _scaled(rows: Tensor, scale: float) -> Tensor:
    """Returns the rows times the scale, in the dtype of the rows."""
    return rows if scale == 1 else rows * scale
