"""Norms with a gate: `GatedNorm` of Mamba-2 gates first and norms groups, `NormAndGate` norms heads and gates then."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels import rms_norm
from ...parallel.shard import Shard
from ..norm import Reduce
from ..weight_slot import WeightSlot

__all__ = ["GatedNorm", "NormAndGate"]


class GatedNorm(nn.Module):
    """Multiplies by the silu of a gate, divides groups of channels by their root mean square, and scales.

    Args:
        channels: This rank's channels among those of the model.
        groups: The groups of these channels. Ranks share a group if there are fewer groups than ranks.
        eps: Number that is added to the mean square.
        dtype: Number type of the scale.
        device: Device of the scale. Its memory is not initialised.
        reduce: Sums a tensor over the ranks; needed only where ranks share groups.
    """

    def __init__(
        self,
        channels: Shard,
        groups: Shard,
        *,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
        reduce: Reduce | None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels.length, dtype=dtype, device=device), requires_grad=False)
        self._channels, self._groups = channels, groups
        self._reduce = reduce if groups.count < channels.count else None

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields the weight slot of the scale."""
        yield "weight", WeightSlot((self.weight,), parts=(self._channels,))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Returns the gated and normed `x`; both are `[num_tokens, num_channels]`, and computed with in float32."""
        gated = (x.float() * F.silu(gate.float())).unflatten(1, (self._groups.length, -1))
        squares = gated.square().sum(-1)  # [num_tokens, num_groups]
        if self._reduce is not None:
            squares = self._sum(squares, self._reduce)
        mean = squares / (self._channels.size // self._groups.size)
        normed = (gated * torch.rsqrt(mean + self.eps).unsqueeze(-1)).flatten(1)
        return self.weight * normed.to(x.dtype)

    def _sum(self, squares: Tensor, reduce: Reduce) -> Tensor:
        """Returns the sums of squares of this rank's groups over all ranks that have a part of them."""
        own = slice(self._groups.start, self._groups.start + self._groups.length)
        of_all = squares.new_zeros(len(squares), self._groups.size)
        of_all[:, own] = squares
        return reduce(of_all)[:, own]


class NormAndGate(nn.Module):
    """Divides each head by its root mean square, scales it, and multiplies by the silu of a gate.

    Args:
        head_dim: Size of a head.
        eps: Number that is added to the mean square.
        dtype: Number type of the scale.
        device: Device of the scale. Its memory is not initialised.
    """

    def __init__(self, head_dim: int, *, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(head_dim, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Returns the normed and gated `x`; both are `[num_tokens, num_heads, head_dim]`."""
        normed, _ = rms_norm(x, self.weight, self.eps)
        return (normed * F.silu(gate.float())).to(x.dtype)
