"""Sampling on the CPU: `greedy` if every row has temperature 0, else row by row in numba."""

from __future__ import annotations

from torch import Tensor

from ..greedy import greedy
from .op import sample


@sample.register("cpu")
def sample_cpu(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Runs `greedy` if every row has temperature 0, else the numba kernel of `sample`."""
    if (temperature > 0).any():
        return sample.fallback("sample_numba")(logits, temperature, top_k, top_p, min_p, seeds, positions)
    return greedy(logits)
