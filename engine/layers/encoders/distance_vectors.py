"""`DistanceVectors`: learned vectors of distances of two tokens, of which attention layers make keys and queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..norm import Norm

__all__ = ["DistanceVectors"]


class DistanceVectors(nn.Module):
    """The vectors of all distances (He et al., 2020, arXiv:2006.03654), one table for all layers.

    Args:
        size: Length of a vector.
        max_distance: Distance from which on all tokens on the same side have the same vector.
        num_buckets: Number of vectors for each side, on a logarithmic scale from half of them on; None for a vector of
            its own for each distance.
        norm: Norm of the vectors; a `NoNorm` in models without one.
        dtype: Number type of the table.
        device: Device of the table. Its memory is not initialised.
    """

    rows: Tensor

    def __init__(
        self,
        size: int,
        max_distance: int,
        num_buckets: int | None,
        *,
        norm: Norm,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        side = num_buckets or max_distance
        self.weight = nn.Parameter(torch.empty(2 * side, size, dtype=dtype, device=device), requires_grad=False)
        self.norm = norm
        distances = torch.arange(-max_distance, max_distance + 1)
        if num_buckets is not None:
            distances = _buckets(distances, num_buckets, max_distance)
        rows = (distances + side).clamp(0, 2 * side - 1)
        self.register_buffer("rows", rows.to(device), persistent=False)

    def forward(self) -> Tensor:
        """Returns the normed vectors, `[num_rows, size]`; `rows` has the row of each distance."""
        normed, _ = self.norm(self.weight)
        assert isinstance(normed, Tensor)
        return normed


def _buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Returns the bucket of each distance, with its sign: the distance itself up to half of the buckets."""
    half = num_buckets // 2
    sizes = distances.abs().clamp(min=half)
    # This is computed in float32 as the models were trained: another rounding would move a distance to the next bucket.
    growth = torch.log(sizes / half) / torch.log(torch.tensor((max_distance - 1) / half))
    larger = (growth * (half - 1)).ceil().long() + half
    return torch.where(distances.abs() <= half, distances, distances.sign() * larger)
