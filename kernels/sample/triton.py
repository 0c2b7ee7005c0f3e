"""Sampling on the GPU, in Triton, without a sort.

A row is drawn in two passes over the vocabulary: one finds its largest logit, one adds the noise. Rows with top_k or
top_p take two more passes, which collect a few thousand candidates for the search of the threshold. Programs read the
parameters on the device, so the launches are the same for all parameters and can be recorded in a CUDA graph.

The distance of a token is -s = (max - logit) / temperature, a float32 of at least 0. The bits of such floats, read as
integers, have the same order. A row keeps the tokens whose bits are at most its limit, which is found by bisection.

Grid: (rows, chunks of the vocabulary), with enough chunks to fill the GPU. Each program stores its part of the result
for the next kernel. The search and the last step have one program per row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import MAX_PLANS, Specialisation, Target, current_target, launch, varying
from .exact import LARGEST_NOISE, SMALLEST_NOISE
from .op import log_min_p, sample
from .triton_exact import mass_of, may_win, noise, row_key, uniform

TILE = 1024
"""The number of tokens that a program reads at once."""

MAX_CHUNKS = 128
"""The most chunks of a row, which one program merges."""

NUM_BOUNDS = 8
"""Rows are measured at distances 2, 4, ... 14 and infinity. At 14 a token is a millionth as likely as the best."""

MAX_CANDIDATES = 16_384
"""The most tokens of a row that are collected. With more candidates every step of the search reads the whole row."""

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""The options of every launch. Fused multiplications would give other bits than the definition."""

_PROGRAMS_PER_PROCESSOR = 4
_TILES_OF_A_START = 2
"""The start and the end of a program as a number of tiles that take as long: an assumption, which was not measured."""

_INFINITY = tl.constexpr(0x7F800000)  # the bits of one
_SMALLEST_NOISE, _LARGEST_NOISE = tl.constexpr(SMALLEST_NOISE), tl.constexpr(LARGEST_NOISE)
# Separate forms for 1 and for multiples of 16 would not be faster.
_SIZES = ("vocab_size", "num_chunks", "num_peaks", "first_id")


@sample.register("cuda")
def sample_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Runs `sample` in six kernels. A program whose row does not need the kernel ends at once."""
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if not len(logits):
        return ids
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_rows, vocab_size = logits.shape
    num_chunks, chunk_size = split(num_rows, vocab_size, current_target())
    by_chunk = (num_rows, num_chunks)
    # Each tensor is allocated separately, because Triton compiles another form for a pointer that is not aligned.
    empty = partial(torch.empty, by_chunk, device=logits.device)
    peaks, scores = empty(dtype=torch.float32), empty(dtype=torch.float32)
    best, winners = empty(dtype=torch.int32), empty(dtype=torch.int32)
    shape = (logits, logits.stride(0), vocab_size, num_chunks, chunk_size)
    launch(peak_kernel, by_chunk, *shape, peaks, best, TILE=TILE, **OPTIONS)
    limits = _find_limits(shape, (temperature, top_k, top_p, log_min_p(min_p)), peaks)
    draws = (temperature, seeds, positions, peaks, limits)
    sizes: dict[str, Any] = {"MAX_CHUNKS": MAX_CHUNKS, "TILE": TILE, **OPTIONS}
    launch(draw_kernel, by_chunk, *shape, num_chunks, 0, *draws, scores, winners, **sizes)
    parts = (peaks, best, scores, winners)
    launch(choose_kernel, (num_rows,), num_chunks, temperature, *parts, ids, MAX_CHUNKS=MAX_CHUNKS, **OPTIONS)
    return ids


def _find_limits(shape: tuple[Any, ...], filters: tuple[Tensor, ...], peaks: Tensor) -> Tensor:
    """Returns the limit of each row, `[num_rows]` int32: the bits of the largest distance of a token that is kept.

    The distance of a token is (peak - logit) / temperature in float32.
    """
    by_chunk, empty = tuple(peaks.shape), partial(torch.empty, device=peaks.device)
    amounts = empty((*by_chunk, NUM_BOUNDS), dtype=torch.float32)
    masses = empty(by_chunk, dtype=torch.int64)
    candidates = empty((by_chunk[0], MAX_CANDIDATES), dtype=torch.float32)
    num_candidates, limits = (empty(by_chunk[0], dtype=torch.int32) for _ in range(2))
    parts = (*filters, peaks, amounts, masses, candidates, num_candidates, limits)
    constants: dict[str, Any] = {"MAX_CHUNKS": MAX_CHUNKS, "TILE": TILE, **OPTIONS}
    launch(measure_kernel, by_chunk, *shape, *parts, NUM_BOUNDS=NUM_BOUNDS, **constants)
    constants["MAX_CANDIDATES"] = MAX_CANDIDATES
    launch(collect_kernel, by_chunk, *shape, *parts, NUM_BOUNDS=NUM_BOUNDS, **constants)
    launch(search_kernel, by_chunk[:1], *shape, *parts, **constants)
    return limits


@functools.lru_cache(MAX_PLANS)
def split(num_rows: int, vocab_size: int, target: Target) -> tuple[int, int]:
    """Returns the number of chunks of each row, and their size, a multiple of a tile.

    Programs run in waves of as many as fit the GPU. The chunks are such that all waves take the shortest time; a last
    wave of few programs takes as long as a full one.
    """
    num_tiles, wave = triton.cdiv(vocab_size, TILE), _PROGRAMS_PER_PROCESSOR * target.num_processors

    def time_in_tiles(num_chunks: int) -> int:
        return triton.cdiv(num_rows * num_chunks, wave) * (triton.cdiv(num_tiles, num_chunks) + _TILES_OF_A_START)

    tiles_per_chunk = triton.cdiv(num_tiles, min(range(1, min(num_tiles, MAX_CHUNKS) + 1), key=time_in_tiles))
    return triton.cdiv(num_tiles, tiles_per_chunk), tiles_per_chunk * TILE


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the only specialisation of each of the six kernels."""
    types = {
        "logits_ptr": "*fp32", "row_stride": "i32", "vocab_size": "i32", "num_chunks": "i32", "chunk_size": "i32",
        "num_peaks": "i32", "first_id": "i32",
        "temperature_ptr": "*fp32", "top_k_ptr": "*i32", "top_p_ptr": "*fp32", "lowest_ptr": "*fp32",
        "seeds_ptr": "*i64", "positions_ptr": "*i64", "peaks_ptr": "*fp32", "best_ptr": "*i32",
        "amounts_ptr": "*fp32", "masses_ptr": "*i64", "candidates_ptr": "*fp32", "num_candidates_ptr": "*i32",
        "limits_ptr": "*i32", "scores_ptr": "*fp32", "winners_ptr": "*i32", "ids_ptr": "*i64",
    }  # fmt: skip
    sizes = {"TILE": TILE, "MAX_CHUNKS": MAX_CHUNKS, "NUM_BOUNDS": NUM_BOUNDS, "MAX_CANDIDATES": MAX_CANDIDATES}
    for kernel in (peak_kernel, measure_kernel, collect_kernel, search_kernel, draw_kernel, choose_kernel):
        yield Specialisation(
            kernel,
            {name: types[name] for name in kernel.arg_names if name in types},
            {name: sizes[name] for name in kernel.arg_names if name in sizes},
            OPTIONS,
            ("row_stride", "chunk_size"),
        )


@triton.jit(do_not_specialize=_SIZES)
def peak_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, vocab_size, num_chunks, chunk_size, peaks_ptr, best_ptr, TILE: tl.constexpr  # noqa: N803
):  # fmt: skip
    """Writes the largest logit of a chunk to `peaks_ptr`, and the lowest token that has it to `best_ptr`.

    NaN counts as infinity. `choose_kernel` gives a row with an infinite logit the token id -1.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, TILE)
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    tokens = tl.full([TILE], 0, tl.int32)
    for start in range(chunk * chunk_size, min((chunk + 1) * chunk_size, vocab_size), TILE):
        x = tl.load(logits_ptr + row * row_stride + start + lanes, mask=start + lanes < vocab_size, other=float("-inf"))
        x = tl.where(x != x, float("inf"), x)
        tokens = tl.where(x > peaks, start + lanes, tokens)
        peaks = tl.maximum(x, peaks)
    peak = tl.max(peaks)
    tl.store(peaks_ptr + row * num_chunks + chunk, peak)
    tl.store(best_ptr + row * num_chunks + chunk, tl.min(tl.where(peaks == peak, tokens, vocab_size)))


@triton.jit(do_not_specialize=_SIZES)
def measure_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, vocab_size, num_chunks, chunk_size,
    temperature_ptr, top_k_ptr, top_p_ptr, lowest_ptr,
    peaks_ptr, amounts_ptr, masses_ptr, candidates_ptr, num_candidates_ptr, limits_ptr,
    MAX_CHUNKS: tl.constexpr, TILE: tl.constexpr, NUM_BOUNDS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Sums, for each distance of `_bounds`, the tokens of a chunk within it: their number for top_k, else their mass.

    Also sums the exact mass of the tokens that min_p keeps.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if chunk == 0:
        tl.store(num_candidates_ptr + row, 0)
    peak = _merge_peaks(peaks_ptr, row, num_chunks, MAX_CHUNKS)
    temperature = tl.load(temperature_ptr + row)
    by_count = tl.load(top_k_ptr + row) > 0
    if _is_drawn(peak, temperature) & (by_count | (tl.load(top_p_ptr + row) < 1)):
        limit = _bits(tl.load(lowest_ptr + row))
        bounds = tl.minimum(_bounds(NUM_BOUNDS), limit)
        lanes = tl.arange(0, TILE // 2)  # a whole tile would need too many registers
        amounts = tl.zeros([TILE // 2, NUM_BOUNDS], tl.float32)
        masses = tl.zeros([TILE // 2], tl.int64)
        for start in range(chunk * chunk_size, min((chunk + 1) * chunk_size, vocab_size), TILE // 2):
            inside = start + lanes < vocab_size
            x = tl.load(logits_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
            bits, mass = _measure(x, peak, temperature)
            masses += tl.where(inside & (bits <= limit), mass, 0)
            amount = tl.where(by_count, 1.0, mass.to(tl.float32))
            is_within = inside[:, None] & (bits[:, None] <= bounds[None, :])
            amounts += tl.where(is_within, amount[:, None], 0.0)
        part = row * num_chunks + chunk
        tl.store(masses_ptr + part, tl.sum(masses))
        tl.store(amounts_ptr + part * NUM_BOUNDS + tl.arange(0, NUM_BOUNDS), tl.sum(amounts, axis=0))


@triton.jit(do_not_specialize=_SIZES)
def collect_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, vocab_size, num_chunks, chunk_size,
    temperature_ptr, top_k_ptr, top_p_ptr, lowest_ptr,
    peaks_ptr, amounts_ptr, masses_ptr, candidates_ptr, num_candidates_ptr, limits_ptr,
    MAX_CHUNKS: tl.constexpr, TILE: tl.constexpr, NUM_BOUNDS: tl.constexpr, MAX_CANDIDATES: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Copies the candidates of a row, in any order: the logits within the smallest of `_bounds` that is sufficient.

    All candidates are counted, but only the first MAX_CANDIDATES are stored.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak = _merge_peaks(peaks_ptr, row, num_chunks, MAX_CHUNKS)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if _is_drawn(peak, temperature) & ((top_k > 0) | (top_p < 1)):
        chunks, columns = tl.arange(0, MAX_CHUNKS)[:, None], tl.arange(0, NUM_BOUNDS)[None, :]
        parts = (row * num_chunks + chunks) * NUM_BOUNDS + columns
        amounts = tl.sum(tl.load(amounts_ptr + parts, mask=chunks < num_chunks, other=0.0), axis=0)
        # Counts are exact. Sums of floats are not, so a bound needs a ten-thousandth more.
        enough = tl.where(top_k > 0, top_k.to(tl.float32), top_p * 1.0001 * tl.max(amounts))
        bound = tl.min(tl.where(amounts >= enough, _bounds(NUM_BOUNDS), _INFINITY))
        bound = tl.minimum(bound, _bits(tl.load(lowest_ptr + row)))
        lanes = tl.arange(0, TILE)
        for start in range(chunk * chunk_size, min((chunk + 1) * chunk_size, vocab_size), TILE):
            inside = start + lanes < vocab_size
            x = tl.load(logits_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
            is_candidate = inside & (_distance(x, peak, temperature) <= bound)
            rank = tl.cumsum(is_candidate.to(tl.int32))
            num_found = tl.max(rank)
            if num_found > 0:
                place = tl.atomic_add(num_candidates_ptr + row, num_found) + rank - 1
                has_room = is_candidate & (place < MAX_CANDIDATES)
                tl.store(candidates_ptr + row * MAX_CANDIDATES + place, x, mask=has_room)


@triton.jit(do_not_specialize=_SIZES)
def search_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, vocab_size, num_chunks, chunk_size,
    temperature_ptr, top_k_ptr, top_p_ptr, lowest_ptr,
    peaks_ptr, amounts_ptr, masses_ptr, candidates_ptr, num_candidates_ptr, limits_ptr,
    MAX_CHUNKS: tl.constexpr, TILE: tl.constexpr, MAX_CANDIDATES: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Finds the limit of a row (see `_find_limits`): that of min_p, narrowed by top_k and then by top_p.

    The candidates are searched, or all logits of the row if there were too many candidates to store.
    """
    row = tl.program_id(0).to(tl.int64)
    peak = _merge_peaks(peaks_ptr, row, num_chunks, MAX_CHUNKS)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    limit = _bits(tl.load(lowest_ptr + row))
    if _is_drawn(peak, temperature) & ((top_k > 0) | (top_p < 1)):
        source, length = logits_ptr + row * row_stride, vocab_size
        num_candidates = tl.load(num_candidates_ptr + row)
        if num_candidates <= MAX_CANDIDATES:
            source, length = candidates_ptr + row * MAX_CANDIDATES, num_candidates
        if top_k > 0:
            limit = _reach(top_k.to(tl.float64), limit, source, length, peak, temperature, False, TILE)
        if top_p < 1:
            # The candidates for top_k include all tokens that are kept so far. The candidates for top_p alone do not.
            chunks = tl.arange(0, MAX_CHUNKS)
            mass = tl.sum(tl.load(masses_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=0))
            if top_k > 0:
                mass = _amount(limit, source, length, peak, temperature, True, TILE)
            target = top_p.to(tl.float64) * mass.to(tl.float64)
            limit = _reach(target, limit, source, length, peak, temperature, True, TILE)
    tl.store(limits_ptr + row, limit)


@triton.jit(**varying(_SIZES, ["positions_ptr"]))
def draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, vocab_size, num_chunks, chunk_size, num_peaks, first_id,
    temperature_ptr, seeds_ptr, positions_ptr, peaks_ptr, limits_ptr, scores_ptr, winners_ptr,
    MAX_CHUNKS: tl.constexpr, TILE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Finds the largest score (scaled logit plus noise) of the kept tokens of a chunk, and the lowest token with it.

    `best` is a score that the winner of the row reaches: the most likely token scores at least the smallest noise, and
    later `best` is the largest score of this chunk so far. A tile in which no token may reach `best` is skipped, first
    by its distances, then by its random bits. Few tiles are left, for which the noise is computed.

    A row has `num_peaks` peaks to merge. `first_id` is the token id of the first column.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak = _merge_peaks(peaks_ptr, row, num_peaks, MAX_CHUNKS)
    temperature = tl.load(temperature_ptr + row)
    if _is_drawn(peak, temperature):
        limit = tl.load(limits_ptr + row)
        key = row_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        lanes = tl.arange(0, TILE)
        best = tl.full([], _SMALLEST_NOISE, tl.float32)
        scores = tl.full([TILE], float("-inf"), tl.float32)
        tokens = tl.full([TILE], 0, tl.int32)
        for start in range(chunk * chunk_size, min((chunk + 1) * chunk_size, vocab_size), TILE):
            inside = start + lanes < vocab_size
            x = tl.load(logits_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
            scaled = tl.div_rn(x - peak, temperature)
            is_kept = inside & (_bits(scaled) <= limit)
            if _any(is_kept & (scaled + _LARGEST_NOISE >= best)):
                v = uniform(first_id + start + lanes, key)
                if _any(is_kept & may_win(v, scaled, best)):
                    score = tl.where(is_kept, scaled + noise(v), float("-inf"))
                    tokens = tl.where(score > scores, start + lanes, tokens)
                    scores = tl.maximum(score, scores)
                    best = tl.maximum(best, tl.max(score))
        score = tl.max(scores)
        winner = first_id + tl.min(tl.where(scores == score, tokens, vocab_size))
        tl.store(scores_ptr + row * num_chunks + chunk, score)
        tl.store(winners_ptr + row * num_chunks + chunk, winner)


@triton.jit(do_not_specialize=_SIZES)
def choose_kernel(  # type: ignore[no-untyped-def]
    num_chunks, temperature_ptr, peaks_ptr, best_ptr, scores_ptr, winners_ptr, ids_ptr,
    MAX_CHUNKS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Writes the id of a row from the results of its chunks: the drawn token, at temperature 0 the most likely one.

    The id is -1 if the largest logit is not finite.
    """
    row = tl.program_id(0).to(tl.int64)
    peak = _merge_peaks(peaks_ptr, row, num_chunks, MAX_CHUNKS)
    if not tl.load(temperature_ptr + row) > 0:
        scores_ptr, winners_ptr = peaks_ptr, best_ptr
    token = tl.full([], -1, tl.int32)
    if (peak > float("-inf")) & (peak < float("inf")):
        chunks = tl.arange(0, MAX_CHUNKS)
        mine, inside = row * num_chunks + chunks, chunks < num_chunks
        scores = tl.load(scores_ptr + mine, mask=inside, other=float("-inf"))
        winners = tl.load(winners_ptr + mine, mask=inside, other=0)
        token = tl.min(tl.where(inside & (scores == tl.max(scores)), winners, 0x7FFFFFFF))
    tl.store(ids_ptr + row, token.to(tl.int64))


@triton.jit
def _merge_peaks(peaks_ptr, row, num_chunks, MAX_CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    chunks = tl.arange(0, MAX_CHUNKS)
    return tl.max(tl.load(peaks_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf")))


@triton.jit
def _is_drawn(peak, temperature):  # type: ignore[no-untyped-def]
    return (temperature > 0) & (peak > float("-inf")) & (peak < float("inf"))


@triton.jit
def _any(is_true):  # type: ignore[no-untyped-def]
    return tl.max(is_true.to(tl.int32)) > 0


@triton.jit
def _bits(s):  # type: ignore[no-untyped-def]
    return tl.abs(s).to(tl.int32, bitcast=True)


@triton.jit
def _distance(x, peak, temperature):  # type: ignore[no-untyped-def]
    return _bits(tl.div_rn(x - peak, temperature))


@triton.jit
def _measure(x, peak, temperature):  # type: ignore[no-untyped-def]
    bits = _distance(x, peak, temperature)
    return bits, mass_of(bits.to(tl.float32, bitcast=True))


@triton.jit
def _bounds(NUM_BOUNDS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    column = tl.arange(0, NUM_BOUNDS)
    return tl.where(column == NUM_BOUNDS - 1, _INFINITY, _bits(2.0 * (column + 1).to(tl.float32)))


@triton.jit
def _reach(target, limit, source, length, peak, temperature, by_mass: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns the least distance, at most the limit, within which the candidates reach the target.

    The search is a bisection whose ends move to the next candidate, so few candidates need few passes. `target` is a
    number of candidates or, with `by_mass`, a mass. Distances and limits are the int32 bits of floats.
    """
    lanes = tl.arange(0, TILE)
    low = limit * 0
    while low < limit:
        middle = low + (limit - low) // 2
        amounts = tl.zeros([TILE], tl.int64)
        below, above = tl.full([TILE], 0, tl.int32), tl.zeros([TILE], tl.int32) + limit
        for start in range(0, length, TILE):
            inside = start + lanes < length
            x = tl.load(source + start + lanes, mask=inside, other=float("-inf"))
            bits, mass = _measure(x, peak, temperature)
            is_below = inside & (bits <= middle)
            amounts += tl.where(is_below, mass if by_mass else 1, 0)
            below = tl.maximum(below, tl.where(is_below, bits, 0))
            above = tl.minimum(above, tl.where(is_below, limit, bits))
        if tl.sum(amounts).to(tl.float64) >= target:
            limit = tl.max(below)
        else:
            low = tl.min(above)
    return limit


@triton.jit
def _amount(limit, source, length, peak, temperature, by_mass: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns the number of candidates within the limit or, with `by_mass`, their mass, int64."""
    lanes = tl.arange(0, TILE)
    amounts = tl.zeros([TILE], tl.int64)
    for start in range(0, length, TILE):
        inside = start + lanes < length
        x = tl.load(source + start + lanes, mask=inside, other=float("-inf"))
        bits, mass = _measure(x, peak, temperature)
        amounts += tl.where(inside & (bits <= limit), mass if by_mass else 1, 0)
    return tl.sum(amounts)
