"""The recurrence of Mamba-2 on the GPU, in Triton: one kernel for decodes, one for prompts and chunks of prompts.

    S = exp(step · rate) · S + step · x ⊗ b,   out = S c + skip · x

Grid: (sequences, heads, blocks of head_dim). A program owns a block of the state of one head. For decodes it reads the
block, takes one step and writes it back, which is all the memory that the step must move. For prompts it goes through
the tokens in chunks of matrix products, as `cpu.py` describes, and reads and writes its block once a chunk: the block
stays in the cache of the GPU, while registers would not hold it beside the operands of products in float32.
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
from .op import state_scan

_MAX_STATE = 2048


@state_scan.register("cuda")
def state_scan_triton(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    rate: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    num_decodes: int = 0,
) -> Tensor:
    """Runs `state_scan` in one kernel for the decodes and one for the other sequences.

    Raises:
        ValueError: The state has more than 2,048 numbers for each number of a head, or shapes or strides do not fit.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    layouts = tuple(Layout.of(tensor) for tensor in (x, dt, b, c, state))
    counts = num_decodes, len(rows) - num_decodes
    for launch, first in zip(_plan(layouts, counts, current_target()), (0, num_decodes), strict=True):
        if launch is not None:
            batch = rows[first:], query_start_loc[first:], seq_lens[first:]
            launch.run(x, dt, b, c, state, *batch, rate, dt_bias, skip, out)
    return out


@functools.lru_cache(MAX_PLANS)
def _plan(layouts: tuple[Layout, ...], counts: tuple[int, int], target: Target) -> tuple[Launch | None, ...]:
    x, dt, b, c, state = layouts
    _, num_heads, head_dim = x.shape
    state_size = b.shape[2]
    fits = state.shape[1:] == (num_heads, head_dim, state_size) and num_heads % b.shape[1] == 0 and b == c
    heads = (x.strides[1:], b.strides[1:], dt.strides[1], state.strides[1:])
    packed = (head_dim, 1), (state_size, 1), 1, (head_dim * state_size, state_size, 1)
    if state_size > _MAX_STATE or not fits or heads != packed:
        raise ValueError(
            f"state_scan: x is {list(x.shape)}, b {list(b.shape)}, c {list(c.shape)} and state {list(state.shape)}; "
            f"state must be [num_rows, num_heads, head_dim, state_size] with at most {_MAX_STATE} numbers in its last "
            "dimension, a token's heads contiguous, and c like b"
        )
    strides = (x.strides[0], dt.strides[0], b.strides[0])
    values = (*strides, num_heads // b.shape[1], num_heads, head_dim, state_size)
    launches: list[Launch | None] = []
    for kernel, tile, count in ((decode_kernel, _decode_tile, counts[0]), (scan_kernel, _scan_tile, counts[1])):
        options = tile(head_dim, state_size, target)
        grid = (count, num_heads, triton.cdiv(head_dim, options["ROWS"]))
        launches.append(Launch(kernel, grid, values, options) if count else None)
    return tuple(launches)


def _decode_tile(head_dim: int, state_size: int, target: Target) -> dict[str, Any]:
    """Returns the tile of a decode: about 2,048 numbers of state, 16 for each of 128 threads."""
    columns = triton.next_power_of_2(state_size)
    rows = max(1, min(triton.next_power_of_2(head_dim), 2048 // columns))
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 128 // target.warp_size}


def _scan_tile(head_dim: int, state_size: int, target: Target) -> dict[str, Any]:
    """Returns the tile of a prompt: products of 16 tokens with parts of the state that registers hold."""
    rows = max(16, min(64, triton.next_power_of_2(head_dim)))
    return {"TOKENS": 16, "ROWS": rows, "COLUMNS": 16, "num_warps": 128 // target.warp_size}


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of both kernels for a target: the smallest state and the largest."""
    strides = ("x_stride", "dt_stride", "b_stride")
    for dtype in ("fp32", "fp16", "bf16"):
        types = dict.fromkeys(("x_ptr", "dt_ptr", "b_ptr", "c_ptr", "out_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("state_ptr", "rate_ptr", "dt_bias_ptr", "skip_ptr"), "*fp32")
        types |= dict.fromkeys(("rows_ptr", "start_ptr", "length_ptr"), "*i32")
        types |= dict.fromkeys((*strides, "group_size", "num_heads", "head_dim", "state_size"), "i32")
        aligned = (*strides, "num_heads", "head_dim", "state_size")
        for kernel, tile in ((decode_kernel, _decode_tile), (scan_kernel, _scan_tile)):
            for head_dim, state_size in ((1, 1), (128, 16), (64, 128), (64, 256)):
                constants = tile(head_dim, state_size, target)
                options = {"num_warps": constants.pop("num_warps")}
                yield Specialisation(kernel, types, constants, options, aligned)


_VARYING = varying(["group_size"], ["x_ptr", "dt_ptr", "b_ptr", "c_ptr", "rows_ptr", "start_ptr", "length_ptr"])


@triton.jit(**_VARYING)
def decode_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    dt_ptr,
    b_ptr,
    c_ptr,
    state_ptr,
    rows_ptr,
    start_ptr,
    length_ptr,
    rate_ptr,
    dt_bias_ptr,
    skip_ptr,
    out_ptr,
    x_stride,
    dt_stride,
    b_stride,
    group_size,
    num_heads,
    head_dim,
    state_size,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Takes one step of ROWS rows of the state of head `program_id(1)`."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    i, j = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row, token = tl.load(rows_ptr + sequence), tl.load(start_ptr + sequence).to(tl.int64)
    # A condition on a sequence becomes a limit on the rows of its state.
    num_old = tl.where((row >= 0) & (tl.load(length_ptr + sequence) > 1), head_dim, 0)
    is_column = (j < state_size)[None, :]
    state_ptr += (row.to(tl.int64) * num_heads + head) * head_dim * state_size + i[:, None] * state_size + j[None, :]
    state = tl.load(state_ptr, mask=(i < num_old)[:, None] & is_column, other=0.0)
    step = softplus(tl.load(dt_ptr + token * dt_stride + head).to(tl.float32) + tl.load(dt_bias_ptr + head))
    x = tl.load(x_ptr + token * x_stride + head * head_dim + i, mask=i < head_dim, other=0.0).to(tl.float32)
    column = head // group_size * state_size + j
    b = tl.load(b_ptr + token * b_stride + column, mask=j < state_size, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + token * b_stride + column, mask=j < state_size, other=0.0).to(tl.float32)
    state = state * tl.exp(step * tl.load(rate_ptr + head)) + (step * x)[:, None] * b[None, :]
    out = tl.sum(state * c[None, :], axis=1) + tl.load(skip_ptr + head) * x
    to = out_ptr + (token * num_heads + head) * head_dim + i
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=i < head_dim)
    tl.store(state_ptr, state, mask=(i < tl.where(row >= 0, head_dim, 0))[:, None] & is_column)


@triton.jit(**_VARYING)
def scan_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    dt_ptr,
    b_ptr,
    c_ptr,
    state_ptr,
    rows_ptr,
    start_ptr,
    length_ptr,
    rate_ptr,
    dt_bias_ptr,
    skip_ptr,
    out_ptr,
    x_stride,
    dt_stride,
    b_stride,
    group_size,
    num_heads,
    head_dim,
    state_size,
    TOKENS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Runs a sequence, TOKENS tokens at a time, through ROWS rows of a state; products take COLUMNS columns of it."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    i, j, line = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[None, :], tl.arange(0, COLUMNS), tl.arange(0, TOKENS)
    row, first = tl.load(rows_ptr + sequence), tl.load(start_ptr + sequence)
    count = tl.load(start_ptr + sequence + 1) - first
    num_old = tl.where((row >= 0) & (tl.load(length_ptr + sequence) > count), head_dim, 0)
    num_kept = tl.where(row >= 0, head_dim, 0)
    state_ptr += (row.to(tl.int64) * num_heads + head) * head_dim * state_size + i * state_size
    rate, skip, bias = tl.load(rate_ptr + head), tl.load(skip_ptr + head), tl.load(dt_bias_ptr + head)
    for begin in range(0, count, TOKENS):
        at, is_token = (first + begin + line).to(tl.int64), begin + line < count
        dt = tl.load(dt_ptr + at * dt_stride + head, mask=is_token, other=0.0).to(tl.float32)
        step = tl.where(is_token, softplus(dt + bias), 0.0)
        total, last = tl.cumsum(step * rate, axis=0), tl.sum(step * rate, axis=0)
        at, is_at = at[:, None], is_token[:, None]
        x = tl.load(x_ptr + at * x_stride + head * head_dim + i, mask=is_at & (i < head_dim), other=0.0).to(tl.float32)
        moved = x * step[:, None]
        scores, out = tl.zeros((TOKENS, TOKENS), dtype=tl.float32), skip * x
        for k in range(0, state_size, COLUMNS):
            column, is_column = (k + j)[None, :], (k + j < state_size)[None, :]
            shared = head // group_size * state_size + column
            b = tl.load(b_ptr + at * b_stride + shared, mask=is_at & is_column, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + at * b_stride + shared, mask=is_at & is_column, other=0.0).to(tl.float32)
            # The state is read and written as [state_size, head_dim], for the products.
            place, is_row = state_ptr + tl.trans(column), tl.trans(is_column)
            state = tl.load(place, mask=(i < num_old) & is_row, other=0.0)
            scores += tl.dot(c, tl.trans(b), input_precision="ieee")
            out += tl.dot(c * tl.exp(total)[:, None], state, input_precision="ieee")
            added = tl.dot(tl.trans(b * tl.exp(last - total)[:, None]), moved, input_precision="ieee")
            tl.debug_barrier()  # every thread has read this part of the state
            tl.store(place, state * tl.exp(last) + added, mask=(i < num_kept) & is_row)
        out += tl.dot(scores * causal_decay(total, line), moved, input_precision="ieee")
        to = out_ptr + (at * num_heads + head) * head_dim + i
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=is_at & (i < head_dim))
        num_old = num_kept
        tl.debug_barrier()  # the next tokens read what this chunk has written


@triton.jit
def causal_decay(total, line):  # type: ignore[no-untyped-def]
    """Returns by which factor a state decays from each token of a chunk to each later one; 0 to earlier ones."""
    return tl.exp(tl.where(line[:, None] >= line[None, :], total[:, None] - total[None, :], -float("inf")))


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    """Returns log(1 + exp(x)), which is x itself for large x."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
