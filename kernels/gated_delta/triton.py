"""The gated delta rule on the GPU, in Triton: one kernel for decodes, one for prompts and chunks of prompts.

    S = exp(g) · S,   S = S + sigmoid(beta) · (v - S k) ⊗ k,   out = S q / sqrt(key_dim)

Grid: (sequences, heads, blocks of head_dim). A program owns some rows of the state of one head; no row needs another.
For decodes it reads them, takes one step and writes them back. For prompts it goes through the tokens in chunks, as
`cpu.py` describes, solves the triangular system row by row, and reads and writes its rows once a chunk, like
`state_scan`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import MAX_PLANS, Launch, Layout, Specialisation, Target, current_target, varying
from ..state_scan.triton import causal_decay, softplus
from .op import EPS, gated_delta

_MAX_KEY_DIM = 2048


@gated_delta.register("cuda")
def gated_delta_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    rate: Tensor,
    decay_bias: Tensor,
    num_decodes: int = 0,
) -> Tensor:
    """Runs `gated_delta` in one kernel for the decodes and one for the other sequences.

    Raises:
        ValueError: Keys have more than 2,048 numbers, or shapes or strides do not fit.
    """
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    layouts = tuple(Layout.of(tensor) for tensor in (query, key, value, decay, beta, state))
    counts = num_decodes, len(rows) - num_decodes
    for launch, first in zip(_plan(layouts, counts, current_target()), (0, num_decodes), strict=True):
        if launch is not None:
            batch = rows[first:], query_start_loc[first:], seq_lens[first:]
            launch.run(query, key, value, decay, beta, state, *batch, rate, decay_bias, out)
    return out


@functools.lru_cache(MAX_PLANS)
def _plan(layouts: tuple[Layout, ...], counts: tuple[int, int], target: Target) -> tuple[Launch | None, ...]:
    query, key, value, decay, beta, state = layouts
    (_, num_groups, key_dim), (_, num_heads, head_dim) = query.shape, value.shape
    fits = state.shape[1:] == (num_heads, head_dim, key_dim) and num_heads % num_groups == 0
    strides = (query.strides[1:], value.strides[1:], decay.strides[1], state.strides[1:])
    packed = (key_dim, 1), (head_dim, 1), 1, (head_dim * key_dim, key_dim, 1)
    if key_dim > _MAX_KEY_DIM or not fits or strides != packed or query != key or decay != beta:
        raise ValueError(
            f"gated_delta: query is {list(query.shape)}, value {list(value.shape)} and state {list(state.shape)}; "
            f"state must be [num_rows, num_heads, head_dim, key_dim] with at most {_MAX_KEY_DIM} numbers in its last "
            "dimension, a token's heads contiguous, key like query, and beta like decay"
        )
    steps = (query.strides[0], value.strides[0], decay.strides[0])
    values = (*steps, num_heads // num_groups, num_heads, head_dim, key_dim, key_dim**-0.5, EPS)
    launches: list[Launch | None] = []
    for kernel, tile, count in ((decode_kernel, _decode_tile, counts[0]), (chunk_kernel, _chunk_tile, counts[1])):
        options = tile(head_dim, key_dim, target)
        grid = (count, num_heads, triton.cdiv(head_dim, options["ROWS"]))
        launches.append(Launch(kernel, grid, values, options) if count else None)
    return tuple(launches)


def _decode_tile(head_dim: int, key_dim: int, target: Target) -> dict[str, Any]:
    """Returns the tile of a decode: about 2,048 numbers of state, 16 for each of 128 threads."""
    columns = triton.next_power_of_2(key_dim)
    rows = max(1, min(triton.next_power_of_2(head_dim), 2048 // columns))
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 128 // target.warp_size}


def _chunk_tile(head_dim: int, key_dim: int, target: Target) -> dict[str, Any]:
    """Returns the tile of a prompt: products of 16 tokens with parts of the state that registers hold."""
    rows = max(16, min(32, triton.next_power_of_2(head_dim)))
    return {"TOKENS": 16, "ROWS": rows, "COLUMNS": 16, "num_warps": 128 // target.warp_size}


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of both kernels for a target: the smallest state and the largest."""
    strides = ("query_stride", "value_stride", "gate_stride")
    for dtype in ("fp32", "fp16", "bf16"):
        types = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "decay_ptr", "beta_ptr", "out_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("state_ptr", "rate_ptr", "bias_ptr"), "*fp32")
        types |= dict.fromkeys(("rows_ptr", "start_ptr", "length_ptr"), "*i32")
        types |= dict.fromkeys((*strides, "group_size", "num_heads", "head_dim", "key_dim"), "i32")
        types |= {"scale": "fp32", "eps": "fp32"}
        aligned = (*strides, "num_heads", "head_dim", "key_dim")
        for kernel, tile in ((decode_kernel, _decode_tile), (chunk_kernel, _chunk_tile)):
            for head_dim, key_dim in ((1, 1), (128, 16), (128, 128), (256, 256)):
                constants = tile(head_dim, key_dim, target)
                options = {"num_warps": constants.pop("num_warps")}
                yield Specialisation(kernel, types, constants, options, aligned)


_VARYING = varying(
    ["group_size", "gate_stride"],
    ["query_ptr", "key_ptr", "value_ptr", "decay_ptr", "beta_ptr", "rows_ptr", "start_ptr", "length_ptr"],
)


@triton.jit(**_VARYING)
def decode_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    decay_ptr,
    beta_ptr,
    state_ptr,
    rows_ptr,
    start_ptr,
    length_ptr,
    rate_ptr,
    bias_ptr,
    out_ptr,
    query_stride,
    value_stride,
    gate_stride,
    group_size,
    num_heads,
    head_dim,
    key_dim,
    scale,
    eps,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Takes one step of ROWS rows of the state of head `program_id(1)`."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    i, j = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row, token = tl.load(rows_ptr + sequence), tl.load(start_ptr + sequence).to(tl.int64)
    # A condition on a sequence becomes a limit on the rows of its state.
    num_old = tl.where((row >= 0) & (tl.load(length_ptr + sequence) > 1), head_dim, 0)
    is_column = (j < key_dim)[None, :]
    state_ptr += (row.to(tl.int64) * num_heads + head) * head_dim * key_dim + i[:, None] * key_dim + j[None, :]
    state = tl.load(state_ptr, mask=(i < num_old)[:, None] & is_column, other=0.0)
    column = head // group_size * key_dim + j
    query = tl.load(query_ptr + token * query_stride + column, mask=j < key_dim, other=0.0).to(tl.float32)
    key = tl.load(key_ptr + token * query_stride + column, mask=j < key_dim, other=0.0).to(tl.float32)
    query *= scale * tl.rsqrt(tl.sum(query * query, axis=0) + eps)
    key *= tl.rsqrt(tl.sum(key * key, axis=0) + eps)
    value = tl.load(value_ptr + token * value_stride + head * head_dim + i, mask=i < head_dim, other=0.0).to(tl.float32)
    decay = tl.load(decay_ptr + token * gate_stride + head).to(tl.float32) + tl.load(bias_ptr + head)
    state *= tl.exp(tl.load(rate_ptr + head) * softplus(decay))
    missing = value - tl.sum(state * key[None, :], axis=1)
    state += (missing * tl.sigmoid(tl.load(beta_ptr + token * gate_stride + head).to(tl.float32)))[:, None] * key[
        None, :
    ]
    out = tl.sum(state * query[None, :], axis=1)
    tl.store(out_ptr + (token * num_heads + head) * head_dim + i, out.to(out_ptr.dtype.element_ty), mask=i < head_dim)
    tl.store(state_ptr, state, mask=(i < tl.where(row >= 0, head_dim, 0))[:, None] & is_column)


@triton.jit(**_VARYING)
def chunk_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    decay_ptr,
    beta_ptr,
    state_ptr,
    rows_ptr,
    start_ptr,
    length_ptr,
    rate_ptr,
    bias_ptr,
    out_ptr,
    query_stride,
    value_stride,
    gate_stride,
    group_size,
    num_heads,
    head_dim,
    key_dim,
    scale,
    eps,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
):
    """Runs a sequence, TOKENS tokens at a time, through ROWS rows of a state; products take COLUMNS columns of it."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    i, j, line = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[None, :], tl.arange(0, COLUMNS), tl.arange(0, TOKENS)
    row, first = tl.load(rows_ptr + sequence), tl.load(start_ptr + sequence)
    count, group = tl.load(start_ptr + sequence + 1) - first, head // group_size
    num_old = tl.where((row >= 0) & (tl.load(length_ptr + sequence) > count), head_dim, 0)
    state_ptr += (row.to(tl.int64) * num_heads + head) * head_dim * key_dim + i * key_dim
    rate, bias, num_kept = tl.load(rate_ptr + head), tl.load(bias_ptr + head), tl.where(row >= 0, head_dim, 0)
    for begin in range(0, count, TOKENS):
        at, is_token = (first + begin + line).to(tl.int64), begin + line < count
        gate = at * gate_stride + head
        decay = tl.load(decay_ptr + gate, mask=is_token, other=0.0).to(tl.float32)
        strength = tl.sigmoid(tl.load(beta_ptr + gate, mask=is_token, other=0.0).to(tl.float32))
        log_kept = tl.where(is_token, rate * softplus(decay + bias), 0.0)
        total, last = tl.cumsum(log_kept, axis=0), tl.sum(log_kept, axis=0)
        at, is_at = at[:, None], is_token[:, None]
        shared = at * query_stride + group * key_dim
        q_scale, k_scale, q_with_k, k_with_k, of_q, of_k = _products(
            query_ptr + shared, key_ptr + shared, state_ptr, is_at, i < num_old, j, key_dim, eps
        )
        of_value = at * value_stride + head * head_dim + i
        value = tl.load(value_ptr + of_value, mask=is_at & (i < head_dim), other=0.0).to(tl.float32)
        kept, between = tl.exp(total)[:, None], causal_decay(total, line)
        system = k_with_k * between * (strength * k_scale)[:, None] * k_scale[None, :]
        added = _solve(system, strength[:, None] * (value - kept * of_k * k_scale[:, None]), line)
        q_scale = (q_scale * scale)[:, None]
        out = kept * of_q * q_scale
        out += tl.dot(q_with_k * between * q_scale * k_scale[None, :], added, input_precision="ieee")
        to = out_ptr + (at * num_heads + head) * head_dim + i
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=is_at & (i < head_dim))
        k_scale *= tl.exp(last - total)
        _update(state_ptr, key_ptr + shared, is_at, i < num_old, i < num_kept, j, key_dim, tl.exp(last), k_scale, added)
        num_old = num_kept
        tl.debug_barrier()  # the next tokens read what this chunk has written


@triton.jit
def _products(query_ptr, key_ptr, state_ptr, is_at, is_old, j, key_dim, eps):  # type: ignore[no-untyped-def]
    """Returns what a chunk needs of its queries and keys, in parts of as many columns as j has.

    These are the factors that make them unit vectors, the products of queries with keys and of keys with keys, and of
    both with the state, all before the factors.
    """
    tokens: tl.constexpr = is_at.shape[0]
    rows: tl.constexpr = is_old.shape[1]
    of_q, of_k = tl.zeros((tokens, rows), dtype=tl.float32), tl.zeros((tokens, rows), dtype=tl.float32)
    q_with_k, k_with_k = tl.zeros((tokens, tokens), dtype=tl.float32), tl.zeros((tokens, tokens), dtype=tl.float32)
    q_square, k_square = tl.zeros((tokens,), dtype=tl.float32), tl.zeros((tokens,), dtype=tl.float32)
    for k in range(0, key_dim, j.shape[0]):
        column, is_column = (k + j)[None, :], (k + j < key_dim)[None, :]
        query = tl.load(query_ptr + column, mask=is_at & is_column, other=0.0).to(tl.float32)
        key = tl.load(key_ptr + column, mask=is_at & is_column, other=0.0).to(tl.float32)
        # The state is read as [key_dim, head_dim], for the products.
        state = tl.load(state_ptr + tl.trans(column), mask=is_old & tl.trans(is_column), other=0.0)
        q_square += tl.sum(query * query, axis=1)
        k_square += tl.sum(key * key, axis=1)
        q_with_k += tl.dot(query, tl.trans(key), input_precision="ieee")
        k_with_k += tl.dot(key, tl.trans(key), input_precision="ieee")
        of_q += tl.dot(query, state, input_precision="ieee")
        of_k += tl.dot(key, state, input_precision="ieee")
    return tl.rsqrt(q_square + eps), tl.rsqrt(k_square + eps), q_with_k, k_with_k, of_q, of_k


@triton.jit
def _solve(system, right, line):  # type: ignore[no-untyped-def]
    """Solves a system whose matrix has ones on its diagonal, and `system` below it, row after row."""
    for t in range(1, line.shape[0]):
        factors = tl.sum(tl.where((line[:, None] == t) & (line[None, :] < t), system, 0.0), axis=0)
        known = tl.sum(factors[:, None] * right, axis=0)
        right = tl.where(line[:, None] == t, right - known[None, :], right)
    return right


@triton.jit
def _update(state_ptr, key_ptr, is_at, is_old, is_kept, j, key_dim, kept, k_scale, added):  # type: ignore[no-untyped-def]
    """Lets the state decay, and adds what a chunk adds, in parts of as many columns as j has."""
    for k in range(0, key_dim, j.shape[0]):
        column, is_column = (k + j)[None, :], (k + j < key_dim)[None, :]
        key = tl.load(key_ptr + column, mask=is_at & is_column, other=0.0).to(tl.float32) * k_scale[:, None]
        place, is_row = state_ptr + tl.trans(column), tl.trans(is_column)
        state = tl.load(place, mask=is_old & is_row, other=0.0) * kept
        state += tl.dot(tl.trans(key), added, input_precision="ieee")
        tl.debug_barrier()  # every thread has read this part of the state
        tl.store(place, state, mask=is_kept & is_row)
