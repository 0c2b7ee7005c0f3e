"""Log-probabilities on the GPU: one pass over the logits in Triton, and torch's topk for the best tokens.

    logprob(token) = logit(token) - peak - log(sum of exp(logit - peak))

Grid: (rows, chunks of the vocabulary). A program stores the peak and the sum of its chunk, and the number of logits
that are larger than that of the given token. Then one program per row merges the chunks. The chunks depend on the size
of the vocabulary only, so no bit of a row depends on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import Specialisation, Target, launch
from .op import top_logprobs

TILE = 1024
MIN_TILES_PER_CHUNK = 8
MAX_CHUNKS = 128
"""The most chunks of a row, which one program merges."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_SIZES = ("vocab_size", "num_chunks", "num_best")
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite, because infinity minus itself is NaN


@top_logprobs.register("cuda")
def top_logprobs_triton(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `top_logprobs` as torch's topk and two kernels."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_rows, vocab_size = logits.shape
    num_chunks, chunk_size = split(vocab_size)
    best_logits, best_ids = logits.topk(k, dim=-1)
    # Each tensor is allocated separately, because Triton compiles another form for a pointer that is not aligned.
    empty = partial(torch.empty, device=logits.device)
    peaks, sums = (empty((num_rows, num_chunks), dtype=torch.float32) for _ in range(2))
    num_larger = empty((num_rows, num_chunks), dtype=torch.int32)
    logprobs = empty((num_rows, k + 1), dtype=torch.float32)
    ids, ranks = empty((num_rows, k + 1), dtype=torch.int64), empty(num_rows, dtype=torch.int64)
    if num_rows:
        shape = (logits, logits.stride(0), token_ids.contiguous(), vocab_size, num_chunks)
        parts = (peaks, sums, num_larger)
        launch(chunk_kernel, (num_rows, num_chunks), *shape, chunk_size, *parts, TILE=TILE, **OPTIONS)
        best = (best_logits, best_ids, k, logprobs, ids, ranks)
        launch(merge_kernel, (num_rows,), *shape, *parts, *best, MAX_CHUNKS=MAX_CHUNKS, **OPTIONS)
    return logprobs, ids, ranks


def split(vocab_size: int) -> tuple[int, int]:
    """Returns the number of chunks of a row, and their size, a multiple of a tile."""
    num_tiles = triton.cdiv(vocab_size, TILE)
    tiles_per_chunk = max(MIN_TILES_PER_CHUNK, triton.cdiv(num_tiles, MAX_CHUNKS))
    return triton.cdiv(num_tiles, tiles_per_chunk), tiles_per_chunk * TILE


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the only specialisation of each of the two kernels."""
    types = {
        "logits_ptr": "*fp32", "row_stride": "i32", "token_ids_ptr": "*i64", "vocab_size": "i32", "num_chunks": "i32",
        "chunk_size": "i32", "peaks_ptr": "*fp32", "sums_ptr": "*fp32", "num_larger_ptr": "*i32",
        "best_logits_ptr": "*fp32", "best_ids_ptr": "*i64", "num_best": "i32",
        "logprobs_ptr": "*fp32", "ids_ptr": "*i64", "ranks_ptr": "*i64",
    }  # fmt: skip
    sizes = {"TILE": TILE, "MAX_CHUNKS": MAX_CHUNKS}
    for kernel in (chunk_kernel, merge_kernel):
        yield Specialisation(
            kernel,
            {name: types[name] for name in kernel.arg_names if name in types},
            {name: sizes[name] for name in kernel.arg_names if name in sizes},
            OPTIONS,
            ("row_stride", "chunk_size"),
        )


@triton.jit(do_not_specialize=_SIZES)
def chunk_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, token_ids_ptr, vocab_size, num_chunks, chunk_size, peaks_ptr, sums_ptr, num_larger_ptr,
    TILE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Computes the peak of a chunk, the sum of exp(logit - peak), and the number of logits above the given token's.

    Each lane has its own peak, and scales its sum when the peak rises (Milakov, Gimelshein, 2018).
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, TILE)
    chosen = tl.load(logits_ptr + row * row_stride + tl.load(token_ids_ptr + row))
    peaks = tl.full([TILE], _LOWEST, tl.float32)
    sums = tl.zeros([TILE], tl.float32)
    num_larger = tl.zeros([TILE], tl.int32)
    for start in range(chunk * chunk_size, min((chunk + 1) * chunk_size, vocab_size), TILE):
        x = tl.load(logits_ptr + row * row_stride + start + lanes, mask=start + lanes < vocab_size, other=float("-inf"))
        new_peaks = tl.maximum(peaks, x)
        sums = sums * tl.exp(peaks - new_peaks) + tl.exp(x - new_peaks)
        peaks = new_peaks
        num_larger += (x > chosen).to(tl.int32)
    peak = tl.max(peaks)
    part = row * num_chunks + chunk
    tl.store(peaks_ptr + part, peak)
    tl.store(sums_ptr + part, tl.sum(sums * tl.exp(peaks - peak)))
    tl.store(num_larger_ptr + part, tl.sum(num_larger))


@triton.jit(do_not_specialize=_SIZES)
def merge_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, token_ids_ptr, vocab_size, num_chunks, peaks_ptr, sums_ptr, num_larger_ptr,
    best_logits_ptr, best_ids_ptr, num_best, logprobs_ptr, ids_ptr, ranks_ptr,
    MAX_CHUNKS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Merges the chunks of a row, and writes its results: the given token in column 0, and then the best tokens."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, MAX_CHUNKS)
    parts, inside = row * num_chunks + lanes, lanes < num_chunks
    peaks = tl.load(peaks_ptr + parts, mask=inside, other=_LOWEST)
    peak = tl.max(peaks)
    total = tl.sum(tl.load(sums_ptr + parts, mask=inside, other=0.0) * tl.exp(peaks - peak))
    normaliser = peak + tl.log(total)
    tl.store(ranks_ptr + row, 1 + tl.sum(tl.load(num_larger_ptr + parts, mask=inside, other=0)).to(tl.int64))
    token = tl.load(token_ids_ptr + row)
    first = row * (num_best + 1)
    tl.store(ids_ptr + first, token)
    tl.store(logprobs_ptr + first, tl.load(logits_ptr + row * row_stride + token) - normaliser)
    for start in range(0, num_best, MAX_CHUNKS):
        mask = start + lanes < num_best
        best = row * num_best + start + lanes
        logit = tl.load(best_logits_ptr + best, mask=mask, other=0.0)
        tl.store(logprobs_ptr + first + 1 + start + lanes, logit - normaliser, mask=mask)
        tl.store(ids_ptr + first + 1 + start + lanes, tl.load(best_ids_ptr + best, mask=mask, other=0), mask=mask)
