"""Attention of encoders on the GPU, in Triton: one kernel, whose programs take tiles of queries of one text.

A row of a tile is one query of one head, with the running softmax of `paged_attention/_tile.py`. Grid: (tiles of
queries, KV heads). The host does not know the lengths of texts, but the longest one: where texts are nearly as long as
that, each has as many tiles as the longest, and a program knows its text by a division. Where they are not, it searches
its text, as the prefill kernel of `paged_attention` does. All calls of a model have the same tiles, so no bit of a text
depends on the others.
"""

# ruff: noqa: N803

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._fp8 import has_e4m3
from .._triton import MAX_PLANS, TORCH_TO_TRITON, Launch, Layout, Specialisation, Target, current_target, varying
from ..paged_attention._configs import MAX_HEAD_DIM, MIN_HEAD_DIM, Config, padded, prefill_config
from ..paged_attention._prefill import find_tile
from ..paged_attention._tile import LOG2_E, heads_of_tile, normalised, start_rows, store_rows
from .op import varlen_attention

_LOG2_E = 1.4426950408889634
_NO_WINDOW = 2**31 - 1
_MAX_EMPTY = 2
"""A grid of as many tiles for every text as for the longest may have so many times the tiles of the other grid."""


class Call(NamedTuple):
    """All that the launch of a call depends on: the layouts of its tensors, and its other arguments."""

    target: Target
    query: Layout
    key: Layout
    value: Layout
    num_seqs: int
    max_seq_len: int
    scale: float
    window: int
    softcap: float
    max_distance: int | None

    @property
    def edited(self) -> bool:
        """Whether scores are edited before the softmax."""
        return self.softcap > 0 or self.max_distance is not None


@varlen_attention.register("cuda")
def varlen_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start_loc: Tensor,
    max_seq_len: int,
    scale: float,
    window: int = 0,
    *,
    softcap: float = 0.0,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """Runs `varlen_attention` in one kernel, without reading any result on the host.

    Raises:
        ValueError: The kernel does not support the heads, the dtypes or the layout of the tensors.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    num_seqs = len(query_start_loc) - 1
    if not (len(query) and num_seqs and max_seq_len):
        return out
    max_distance = None if distance_bias is None else distance_bias.shape[1] // 2
    layouts = Layout.of(query), Layout.of(key), Layout.of(value)
    call = Call(current_target(), *layouts, num_seqs, max_seq_len, scale, window, softcap, max_distance)
    launch = plan_launch(call)
    # Without a bias, a pointer of the right type that is not read.
    bias = query_start_loc.view(torch.float32) if distance_bias is None else distance_bias
    launch.run(query, key, value, query_start_loc, bias, out)
    return out


@functools.lru_cache(MAX_PLANS)
def plan_launch(call: Call) -> Launch:
    """Returns the kernel of a call with its arguments.

    Raises:
        ValueError: The kernel does not support the heads, the dtypes or the layout of the tensors.
    """
    _check(call)
    num_tokens, num_heads, head_dim = call.query.shape
    num_kv_heads = call.key.shape[1]
    group = num_heads // num_kv_heads
    config = text_config(call.target, call.query.dtype, head_dim, call.edited)
    queries_per_tile = config.block_m // min(group, config.block_m)
    num_tiles = num_tokens // queries_per_tile + call.num_seqs
    tiles_per_seq = triton.cdiv(call.max_seq_len, queries_per_tile)
    if call.num_seqs * tiles_per_seq <= _MAX_EMPTY * num_tiles:
        num_tiles = call.num_seqs * tiles_per_seq
    else:
        tiles_per_seq = 0
    values = (
        *(stride for layout in call[1:4] for stride in layout.strides[:2]),
        *(num_heads, group, call.num_seqs, tiles_per_seq, call.window or _NO_WINDOW),
        *(call.max_distance or 0, int(call.max_distance is not None)),
        _LOG2_E * (2 * call.scale / call.softcap if call.softcap else call.scale),
        _LOG2_E * call.softcap,
        *(head_dim, padded(head_dim), *config.tile().values(), call.edited),
    )
    grid = num_tiles, num_kv_heads * triton.cdiv(group, config.block_m)
    return Launch(text_kernel, grid, values, config.options())


def text_config(target: Target, dtype: torch.dtype, head_dim: int, edited: bool) -> Config:
    """Returns the tiles of the kernel: of few rows, since many texts are short, and none that spills registers.

    A bias takes a register for each score and two for its address, so a tile of edited scores has fewer of them.
    float32 is multiplied in registers.
    """
    is_large = head_dim > 128
    if target.warp_size == 64:
        return prefill_config(target, dtype, dtype, head_dim, edited)
    if dtype == torch.float32:
        return Config(32 if is_large else 16, 16, 16 if head_dim >= 64 else 8, 1)
    if edited:
        return Config(32 if is_large else 64, 32, 8, 3)
    return Config(64, 32 if is_large else 64, 4 if head_dim <= 64 and has_e4m3(target) else 8, 3)


def _check(call: Call) -> None:
    """Raises `ValueError` unless the kernel supports the shapes, dtypes and strides of a call."""
    num_tokens, num_heads, head_dim = call.query.shape
    _, num_kv_heads, key_dim = call.key.shape
    sizes_fit = (
        MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and key_dim == head_dim and len({num_tokens, call.key[0][0]}) == 1
    )
    if not sizes_fit or num_heads % num_kv_heads or call.value.shape != call.key.shape:
        raise ValueError(
            f"varlen_attention: a query of {list(call.query.shape)}, keys of {list(call.key.shape)} and values of "
            f"{list(call.value.shape)}; tokens and head sizes must be equal, a head has {MIN_HEAD_DIM} to "
            f"{MAX_HEAD_DIM} numbers, and the number of KV heads must divide that of query heads"
        )
    if not call.query.dtype == call.key.dtype == call.value.dtype:
        raise ValueError(
            f"varlen_attention: a query in {call.query.dtype}, keys in {call.key.dtype} and values in "
            f"{call.value.dtype}; the dtypes must be equal"
        )
    if not call.query.strides[2] == call.key.strides[2] == call.value.strides[2] == 1:
        raise ValueError("varlen_attention: the numbers of a head must be contiguous; call .contiguous() before")
    if call.max_seq_len * max(call.key.strides[0], call.value.strides[0]) >= 2**31:
        raise ValueError(
            f"varlen_attention: a text of {call.max_seq_len} tokens, {call.key.strides[0]} numbers apart; the kernel "
            f"counts up to 2**31 numbers of a text: cut the text, or call .contiguous() before"
        )


_SIZES = ("num_heads", "group", "num_seqs", "tiles_per_seq", "window", "max_distance", "has_bias")


@triton.jit(**varying(_SIZES))
def text_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, starts_ptr, bias_ptr, out_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    num_heads, group, num_seqs, tiles_per_seq, window, max_distance, has_bias, score_scale, cap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDITED: tl.constexpr,
):  # fmt: skip
    """Attends from one tile of queries of a text to the whole text, or to the window around the tile.

    Args (those that are not arguments of `varlen_attention`):
        tiles_per_seq: The number of tiles of every text, or 0 if the text of a tile has to be searched.
        EDITED: Whether scores are edited before the softmax, by a softcap or by a bias.
    """
    kv_head, first_head, tile_heads = heads_of_tile(group, BLOCK_M)
    width = tl.minimum(group, BLOCK_M)
    tile = tl.program_id(0)
    if tiles_per_seq > 0:
        seq, tile = tile // tiles_per_seq, tile % tiles_per_seq
    else:
        seq, tile = find_tile(starts_ptr, tile, num_seqs * 0, num_seqs, BLOCK_M // width)
    start = tl.load(starts_ptr + seq)
    length = tl.load(starts_ptr + seq + 1) - start
    first_query = tile * (BLOCK_M // width)
    if first_query >= length:
        return
    rows = tl.arange(0, BLOCK_M)
    queries, heads = first_query + rows // width, first_head + rows % width
    last_query = tl.minimum(first_query + BLOCK_M // width, length) - 1
    valid = (queries <= last_query) & (rows % width < tile_heads)
    first = tl.maximum(first_query - window + 1, 0) // BLOCK_N * BLOCK_N
    end = length - tl.maximum(length - last_query - window, 0)  # last_query + window could overflow
    whole = tl.where(window >= length, length // BLOCK_N * BLOCK_N, first)

    columns = tl.arange(0, BLOCK_D)
    q_rows = (start + queries).to(tl.int64) * q_stride + heads * q_head_stride
    q_mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=q_mask, other=0.0)
    k_ptr += start.to(tl.int64) * k_stride + kv_head * k_head_stride
    v_ptr += start.to(tl.int64) * v_stride + kv_head * v_head_stride
    bias_rows, has_bias = heads * (2 * max_distance + 1) + max_distance, rows % width < tile_heads * has_bias
    row_max, row_sum, acc = start_rows(heads, BLOCK_D)
    row_max, row_sum, acc = attend_text(
        q, row_max, row_sum, acc, queries, bias_ptr, bias_rows, has_bias, max_distance, first, whole, length, window,
        k_ptr, v_ptr, k_stride, v_stride, score_scale, cap, HEAD_DIM, BLOCK_N, EDITED, MASKED=False,
    )  # fmt: skip
    row_max, row_sum, acc = attend_text(
        q, row_max, row_sum, acc, queries, bias_ptr, bias_rows, has_bias, max_distance, whole, end, length, window,
        k_ptr, v_ptr, k_stride, v_stride, score_scale, cap, HEAD_DIM, BLOCK_N, EDITED, MASKED=True,
    )  # fmt: skip
    out_rows = (start + queries).to(tl.int64) * num_heads + heads
    store_rows(out_ptr, normalised(acc, row_sum), out_rows, valid, HEAD_DIM)


@triton.jit
def attend_text(  # type: ignore[no-untyped-def]
    q, row_max, row_sum, acc, queries, bias_ptr, bias_rows, has_bias, max_distance, first, end, length, window,
    k_ptr, v_ptr, k_stride, v_stride, score_scale, cap,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, EDITED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attends from the rows of `queries` to the keys from `first` to `end - 1` of their text, in tiles of BLOCK_N.

    Without MASKED, every row sees all keys, and these are whole tiles. With EDITED, scores are bounded by `cap`, if it
    is not 0, and rows that have a bias add that of their distance; `bias_rows` are the places of those of distance 0.
    """
    columns = tl.arange(0, q.shape[1])
    steps = tl.arange(0, BLOCK_N)
    k_places = steps[:, None] * k_stride + columns[None, :]
    v_places = steps[:, None] * v_stride + columns[None, :]
    bias = 0.0
    if EDITED:
        bias = load_bias(bias_ptr, bias_rows, has_bias, first + steps, queries, max_distance)
    for begin in range(first, end, BLOCK_N):
        keys = begin + steps
        readable = keys < length if MASKED else tl.full([BLOCK_N], True, tl.int1)
        mask = readable[:, None] & (columns < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + begin * k_stride + k_places, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        if EDITED:
            capped = cap - 2.0 * cap / (tl.exp2(scores) + 1.0)  # cap * tanh, with 2 log2(e) in score_scale
            scores = tl.where(cap > 0.0, capped, scores) + LOG2_E * bias
            # One tile ahead: otherwise the compiler would copy biases to shared memory, beside keys and values.
            bias = load_bias(bias_ptr, bias_rows, has_bias, keys + BLOCK_N, queries, max_distance)
        if MASKED:
            distances = tl.abs(queries[:, None] - tl.where(readable, keys, -(2**30))[None, :])  # huge if unreadable
            scores = tl.where(distances < tl.minimum(window, 2**30), scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        kept = tl.exp2(row_max - new_max)
        row_sum = row_sum * kept + tl.sum(weights, 1)
        v = tl.load(v_ptr + begin * v_stride + v_places, mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit
def load_bias(bias_ptr, bias_rows, has_bias, keys, queries, max_distance):  # type: ignore[no-untyped-def]
    """Returns the biases of a tile of scores; 0 in rows that have none."""
    distances = keys[None, :] - queries[:, None]
    places = tl.maximum(tl.minimum(distances, max_distance), -max_distance)
    wanted = has_bias[:, None] & (keys >= 0)[None, :]  # The mask has the shape of the tile.
    return tl.load(bias_ptr + (bias_rows[:, None] + places), mask=wanted, other=0.0)


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for a target, from the smallest to the largest sizes."""
    dtypes = torch.float32, torch.float16, torch.bfloat16
    for dtype, head_dim, edited in product(dtypes, (MIN_HEAD_DIM, 64, 128, MAX_HEAD_DIM), (False, True)):
        config = text_config(target, dtype, head_dim, edited)
        values: dict[str, Any] = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "EDITED": edited} | config.tile()
        constants = {name: values[name] for name in text_kernel.arg_names if name in values}
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*" + TORCH_TO_TRITON[dtype])
        types |= {"starts_ptr": "*i32", "bias_ptr": "*fp32", "score_scale": "fp32", "cap": "fp32"}
        types = {name: types.get(name, "i32") for name in text_kernel.arg_names if name not in constants}
        multiples = tuple(name for name in types if name.endswith("_stride") and head_dim % 16 == 0)
        # Only copies of at least four bytes a thread are asynchronous, which rows of very small heads are not.
        overlaps = config.num_stages > 1 and dtype != torch.float32 and head_dim >= 64
        yield Specialisation(text_kernel, types, constants, config.options(), multiples, overlaps)
