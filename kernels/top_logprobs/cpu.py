"""Log-probabilities on the CPU: one numba pass per row for the normaliser, the rank and the best tokens.

The order of the sum of a row does not depend on its batch or the number of threads: the numbers of a tile are summed in
float32, and the sums of tiles in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._numba import REORDER, Array, Scalar, float_from_bits, jit
from .._threads import team
from .op import top_logprobs

_MAX_INSERTED = 64
"""The largest number of best tokens that are kept in order while a row is read. torch selects larger numbers."""

_MIN_PARALLEL_TOKENS = 100_000
"""About 50 µs of one core, which is the cost of using threads."""

_TILE = 1024


@top_logprobs.register("cpu")
def top_logprobs_cpu(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `top_logprobs` row by row in numba."""
    logits = logits.contiguous()
    num_rows, num_inserted = len(logits), k if k <= _MAX_INSERTED else 0
    scores = torch.empty((num_rows, k + 1), dtype=torch.float32)
    ids = torch.empty((num_rows, k + 1), dtype=torch.int64)
    ranks = torch.empty(num_rows, dtype=torch.int64)
    if k > num_inserted:
        scores[:, 1:], ids[:, 1:] = logits.topk(k, dim=-1)
    tensors = (logits, logits.amax(-1) if num_rows else ranks, token_ids.contiguous(), scores, ids, ranks)
    arguments = (num_inserted, *(tensor.numpy() for tensor in tensors))
    if logits.numel() < _MIN_PARALLEL_TOKENS:
        _score(0, num_rows, *arguments)
    else:
        team.run(_score, num_rows, *arguments)
    return scores, ids, ranks


@jit()
def _score(
    first: int,
    last: int,
    num_inserted: int,
    logits: Array,
    peaks: Array,
    token_ids: Array,
    scores: Array,
    ids: Array,
    ranks: Array,
) -> None:
    """Fills rows `first` to `last - 1` of `scores`, `ids` and `ranks`.

    The `num_inserted` best tokens are found here. If this is 0, `scores` and `ids` hold the best logits and
    their tokens already.
    """
    for row in range(first, last):
        peak, chosen = peaks[row], logits[row, token_ids[row]]
        scores[row, 0], ids[row, 0] = chosen, token_ids[row]
        best, best_ids = scores[row, 1 : 1 + num_inserted], ids[row, 1 : 1 + num_inserted]
        best[:], best_ids[:] = -np.inf, 0
        total, num_larger, num_seen = 0.0, 0, 0
        for start in range(0, logits.shape[1], _TILE):
            tile = logits[row, start : start + _TILE]
            total += _sum_exp(tile, peak)
            num_larger += _count_larger(tile, chosen)
            if num_inserted and (num_seen < num_inserted or _count_larger(tile, best[-1])):
                num_seen = _insert(tile, start, num_seen, best, best_ids)
        ranks[row] = 1 + num_larger
        normaliser = np.float32(peak + np.log(total))
        for column in range(scores.shape[1]):
            scores[row, column] -= normaliser


@jit()
def _insert(tile: Array, start: int, num_seen: int, best: Array, best_ids: Array) -> int:
    """Inserts the tokens of a tile into the sorted best ones so far; returns how many of `best` are now in use."""
    for i, x in enumerate(tile):
        if num_seen < len(best) or x > best[-1]:
            num_seen = min(num_seen + 1, len(best))
            place = num_seen - 1
            while place > 0 and x > best[place - 1]:
                best[place], best_ids[place] = best[place - 1], best_ids[place - 1]
                place -= 1
            best[place], best_ids[place] = x, start + i
    return num_seen


@jit()
def _count_larger(tile: Array, limit: Scalar) -> Scalar:
    count = np.int32(0)
    for i in range(len(tile)):
        count += np.int32(tile[i] > limit)
    return count


@jit(fastmath=REORDER)
def _sum_exp(tile: Array, peak: Scalar) -> Scalar:
    total = np.float32(0)
    for i in range(len(tile)):  # iterating over the array itself does not vectorise
        total += _exp(tile[i] - peak)
    return np.float64(total)


@jit()
def _exp(x: Scalar) -> Scalar:
    """Returns exp(x) for x <= 0 with a relative error of 2e-7, in operations that are vectorised."""
    x = max(x, np.float32(-87))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693145751953125) - n * np.float32(1.4286068203094172e-06)  # ln 2 in two parts
    series = np.float32(1 / 5040) * r + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(1 / 2)
    series = (series * r + np.float32(1)) * r + np.float32(1)
    return series * float_from_bits(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
