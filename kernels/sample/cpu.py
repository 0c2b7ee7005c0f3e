"""Sampling on the CPU: the largest logit of each row (compiled: `native.cpp`), and a draw for those that want one."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import native_kernel
from .op import sample

_FIND_PEAKS = native_kernel("find_peaks", "PPPli")


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
    """Runs `sample`: a search for the largest logits where every row is greedy, else row by row in numba."""
    if (temperature > 0).any():
        return sample.fallback("sample_numba")(logits, temperature, top_k, top_p, min_p, seeds, positions)
    peaks, ids = _find_peaks(logits)
    return ids.masked_fill_(~peaks.isfinite(), -1)


def _find_peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the largest number of each row, and the first place where it is; NaN, and some place, if any is NaN."""
    if _FIND_PEAKS is None or logits.stride(1) != 1:
        largest = logits.max(-1)
        return largest.values, largest.indices
    num_rows, vocab_size = logits.shape
    peaks, ids = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
    _FIND_PEAKS(num_rows, logits.data_ptr(), peaks.data_ptr(), ids.data_ptr(), logits.stride(0), vocab_size)
    return peaks, ids
