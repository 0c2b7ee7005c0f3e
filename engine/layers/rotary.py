"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), half-split pairs.

How frequencies are scaled for long contexts is decided when the model's spec is made; here they are given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels import rotary

__all__ = ["NoRotary", "Rotary"]


class Rotary(nn.Module):
    """Rotates queries and keys by their positions. One instance serves all layers.

    Args:
        inv_freq: Radians per position of each rotated pair, `rot_dim / 2` numbers.
        scaling: Factor on cosine and sine (YaRN's attention scaling; 1 otherwise).
        max_positions: Positions the table covers.
        device: Of the table.
    """

    cos_sin: Tensor

    def __init__(self, inv_freq: Sequence[float], *, scaling: float, max_positions: int, device: torch.device) -> None:
        super().__init__()
        frequencies = torch.tensor(inv_freq, dtype=torch.float32, device=device)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32, device=device), frequencies)
        table = torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(scaling)  # [max_positions, rot_dim]
        self.register_buffer("cos_sin", table, persistent=False)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> None:
        """Rotates queries and keys in place.

        Args:
            positions: `[num_tokens]` int64.
            query: `[num_tokens, num_heads, head_dim]`; changed.
            key: `[num_tokens, num_kv_heads, head_dim]`; changed.
        """
        rotary(positions, query, key, self.cos_sin)


class NoRotary(nn.Module):
    """Stands where positions reach the model another way: queries and keys stay as they are."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> None:
        """Does nothing."""
