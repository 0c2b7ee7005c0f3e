"""Drawing on the CPU without a sort: a numba kernel that computes the rows one by one.

1. Scale the row, into a buffer.
2. Only with top_k or top_p: sum tokens and mass in slices of s, and find the threshold by partitioning the slice that
   contains it.
3. Add the noise, and return the token with the largest sum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._numba import Array, Scalar, bits_from_float, float_from_bits, jit
from .._threads import team
from .exact import GOLDEN_32, GOLDEN_64, LN2_HIGH, LN2_LOW
from .op import MASS_SCALE, log_min_p

_MIN_PARALLEL_TOKENS = 100_000
"""About 200 µs of one core. Smaller calls do not gain from threads."""

_SLICES_PER_UNIT = 64
_NUM_SLICES = 28 * _SLICES_PER_UNIT + 1
"""Slices of s from 0 down to -28, where the mass of a token is 0 (exp(-28) < 2^-40), and one for all below."""

_TILE = 1024
"""The number of scores per loop: computing them is vectorised, the search for the largest one is not."""


def sample_numba(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Runs `sample` row by row."""
    peaks, ids = logits.max(-1)
    ids.masked_fill_(~peaks.isfinite(), -1)
    filters = (temperature, top_k, top_p, log_min_p(min_p))
    draw_rows(logits, 0, peaks, filters, (seeds, positions), (torch.empty_like(peaks), ids))
    return ids


def draw_rows(
    logits: Tensor,
    first_id: int,
    peaks: Tensor,
    filters: tuple[Tensor, Tensor, Tensor, Tensor],
    draws: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor],
) -> None:
    """Draws a token for each row with a temperature above 0 and a finite peak.

    Args:
        logits: `[num_rows, num_columns]` float32.
        first_id: Token id of the first column.
        peaks: `[num_rows]` float32, the largest logit of each row.
        filters: temperature, top_k, top_p and the result of `log_min_p`, `[num_rows]` each.
        draws: seeds and positions, `[num_rows]` each.
        results: `[num_rows]` float32 and int64, to which the scores and the ids of the drawn tokens are written.
    """
    rows = ((filters[0] > 0) & peaks.isfinite()).nonzero().flatten()
    tensors = (rows, logits, peaks, *filters, *draws, *results)
    arguments = (first_id, *(tensor.numpy() for tensor in tensors))
    if len(rows) * logits.shape[-1] < _MIN_PARALLEL_TOKENS:
        _draw(0, len(rows), *arguments)
    else:
        team.run(_draw, len(rows), *arguments)


@jit()
def _draw(
    first: int,
    last: int,
    first_id: int,
    rows: Array,
    logits: Array,
    peaks: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    lowest: Array,
    seeds: Array,
    positions: Array,
    scores: Array,
    ids: Array,
) -> None:
    """Writes the score and the id of the token that each of `rows[first:last]` draws; `lowest` is from `log_min_p`."""
    vocab_size = logits.shape[1]
    scaled, candidates = np.empty(vocab_size, np.float32), np.empty(vocab_size, np.float32)
    for row in rows[first:last]:
        for token in range(vocab_size):
            scaled[token] = (logits[row, token] - peaks[row]) / temperature[row]
        threshold = lowest[row]
        if top_k[row] > 0 or top_p[row] < 1:
            num_kept = _compress(scaled, vocab_size, threshold, candidates)
            if 0 < top_k[row] < num_kept:
                threshold = _reach(candidates, num_kept, np.float64(top_k[row]), False)
                num_kept = _compress(candidates, num_kept, threshold, candidates)
            if top_p[row] < 1:
                threshold = _reach(candidates, num_kept, np.float64(top_p[row]), True)
        key = _row_key(np.uint64(seeds[row]), np.uint64(positions[row]))
        key_low, key_high = np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))
        if threshold == -np.inf:
            scores[row], winner = _argmax(scaled, first_id, key_low, key_high)
        else:
            scores[row], winner = _argmax_kept(scaled, first_id, threshold, key_low, key_high)
        ids[row] = winner


@jit()
def _compress(source: Array, length: int, threshold: Scalar, out: Array) -> int:
    """Copies the numbers >= threshold to the front of `out`, which may be the source, and returns their count."""
    count = 0
    for i in range(length):
        s = source[i]
        if s >= threshold:
            out[count] = s
            count += 1
    return count


@jit()
def _reach(candidates: Array, length: int, target: Scalar, by_mass: bool) -> Scalar:
    """Returns the largest scaled logit s such that the candidates at or above s reach the target.

    Args:
        candidates: Scaled logits, float32, in any order. Only the first `length` are used.
        length: The number of candidates.
        target: A share of the mass of all candidates if `by_mass`, else a number of candidates.
        by_mass: Whether to sum the mass of candidates in place of their number.
    """
    amounts = np.zeros(_NUM_SLICES, np.int64)
    for i in range(length):
        amounts[_slice(candidates[i])] += _mass(candidates[i]) if by_mass else 1
    if by_mass:
        target *= np.float64(amounts.sum())
    above, deciding = np.int64(0), 0
    while deciding < _NUM_SLICES - 1 and np.float64(above + amounts[deciding]) < target:
        above += amounts[deciding]
        deciding += 1
    inside = np.empty(length, np.float32)
    count = 0
    for i in range(length):
        if _slice(candidates[i]) == deciding:
            inside[count] = candidates[i]
            count += 1
    return _reach_inside(inside[:count], above, target, by_mass)


@jit()
def _reach_inside(inside: Array, above: Scalar, target: Scalar, by_mass: bool) -> Scalar:
    """Finds the result of `_reach` in one slice by three-way partition; `above` is the amount in larger slices."""
    while True:
        pivot = inside[len(inside) // 2]
        larger, smaller = np.empty_like(inside), np.empty_like(inside)
        num_larger, num_smaller = 0, 0
        amount_larger, amount_equal = np.int64(0), np.int64(0)
        for s in inside:
            amount = _mass(s) if by_mass else 1
            if s > pivot:
                larger[num_larger] = s
                num_larger += 1
                amount_larger += amount
            elif s < pivot:
                smaller[num_smaller] = s
                num_smaller += 1
            else:
                amount_equal += amount
        if num_larger > 0 and np.float64(above + amount_larger) >= target:
            inside = larger[:num_larger]
        elif num_smaller == 0 or np.float64(above + amount_larger + amount_equal) >= target:
            return pivot
        else:
            above += amount_larger + amount_equal
            inside = smaller[:num_smaller]


@jit()
def _slice(s: Scalar) -> Scalar:
    return np.int64(min(s * np.float32(-_SLICES_PER_UNIT), np.float32(_NUM_SLICES - 1)))


@jit()
def _mass(s: Scalar) -> Scalar:
    return np.int64(_exp32(s) * np.float32(MASS_SCALE))


@jit()
def _argmax(scaled: Array, first_id: int, key_low: Scalar, key_high: Scalar) -> tuple[Scalar, int]:
    """Returns the largest score, which is a scaled logit plus Gumbel noise, and the id of the token that has it."""
    scores = np.empty(_TILE, np.float32)
    best, winner = np.float32(-np.inf), first_id
    for start in range(0, len(scaled), _TILE):
        length = min(_TILE, len(scaled) - start)
        for i in range(length):
            scores[i] = scaled[start + i] + _gumbel(np.uint32(first_id + start + i), key_low, key_high)
        for i in range(length):
            if scores[i] > best:
                best, winner = scores[i], first_id + start + i
    return best, winner


@jit()
def _argmax_kept(
    scaled: Array, first_id: int, threshold: Scalar, key_low: Scalar, key_high: Scalar
) -> tuple[Scalar, int]:
    """Returns the largest score (see `_argmax`) of the tokens with a scaled logit >= threshold, and its token."""
    best, winner = np.float32(-np.inf), first_id
    for token in range(len(scaled)):
        if scaled[token] >= threshold:
            score = scaled[token] + _gumbel(np.uint32(first_id + token), key_low, key_high)
            if score > best:
                best, winner = score, first_id + token
    return best, winner


# The functions below repeat exact.py operation by operation, without fastmath, which would change bits.


@jit()
def _row_key(seed: Scalar, position: Scalar) -> Scalar:
    return _mix64(_mix64(seed + np.uint64(GOLDEN_64)) + position)


@jit()
def _mix64(h: Scalar) -> Scalar:
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


@jit()
def _gumbel(token_id: Scalar, key_low: Scalar, key_high: Scalar) -> Scalar:
    # numba computes the product in 64 bits, so each step is cut back to 32.
    bits = _mix32(np.uint32(_mix32(np.uint32(token_id * np.uint32(GOLDEN_32) + key_low)) ^ key_high))
    v = min((np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    rest = np.float32(1) - v
    exact = -_log32(rest) * (v / (np.float32(1) - rest))
    return -_log32(v if rest == np.float32(1) else exact)


@jit()
def _mix32(h: Scalar) -> Scalar:
    h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32((h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))


@jit()
def _log32(x: Scalar) -> Scalar:
    bits = np.int32(bits_from_float(x)) - np.int32(0x3F3504F3)
    n = np.float32(np.int32(bits >> np.int32(23)))
    m = float_from_bits(np.uint32((bits & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)))
    z = (m - np.float32(1)) / (m + np.float32(1))
    square = z * z
    series = np.float32(1 / 9) * square + np.float32(1 / 7)
    series = series * square + np.float32(1 / 5)
    series = series * square + np.float32(1 / 3)
    series = series * square + np.float32(1)
    return n * np.float32(LN2_HIGH) + (n * np.float32(LN2_LOW) + z * series * np.float32(2))


@jit()
def _exp32(x: Scalar) -> Scalar:
    x = max(x, np.float32(-87))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(LN2_HIGH) - n * np.float32(LN2_LOW)
    series = np.float32(1 / 5040) * r + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(1 / 2)
    series = (series * r + np.float32(1)) * r + np.float32(1)
    return series * float_from_bits(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
