"""Embeddings: of token ids, and of positions in models that learn them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels import embedding

__all__ = ["LearnedPositions", "NoPositions", "TokenEmbedding"]


class TokenEmbedding(nn.Module):
    """Looks token ids up.

    Args:
        num_embeddings: Rows of the table.
        size: Length of a row.
        dtype: Of the table.
        device: Of the table. Its memory is not initialised.
    """

    def __init__(self, num_embeddings: int, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Maps `token_ids` `[num_tokens]` int64 to `[num_tokens, size]`."""
        return embedding(token_ids, self.weight)


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
