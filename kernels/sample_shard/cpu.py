"""The part of a draw on the CPU: the rows one by one in the numba kernel of `sample`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sample._cpu_numba import draw_rows
from ..sample.op import log_min_p
from .op import only_possible, sample_shard


@sample_shard.register("cpu")
def sample_shard_cpu(
    logits: Tensor,
    first_id: int,
    peaks: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Runs `sample_shard` row by row in numba."""
    scores, ids = torch.full_like(peaks, -torch.inf), torch.full((len(peaks),), -1, dtype=torch.int64)
    filters = (temperature, torch.zeros_like(seeds, dtype=torch.int32), torch.ones_like(peaks), log_min_p(min_p))
    draw_rows(logits, first_id, peaks, filters, (seeds, positions), (scores, ids))
    return only_possible(scores, ids.int(), scores > -torch.inf)
