"""The products of many LoRA adapters on the GPU, in Triton.

    hidden[j, p] = A[s, p, :r] · x[t]          out[t, p] += hidden[j, p] · B[s, :r, p]

j counts the rows that have an adapter: t = tokens[j] and s is the slot of j, r = ranks[s, p].

`shrink_kernel`, grid (tiles of rows x parts and blocks of ranks x splits of the inputs), writes the sums of each split
in float32. `expand_kernel`, grid (tiles of rows x tiles of columns, none of which is in two parts), adds up the splits
in order, multiplies, and adds the product to `out`.

A tile of rows is in one slot. Which one, the program reads from `starts`, so the grid depends on shapes alone and a
launch can be recorded: slot s has the tiles from `starts[s] // ROWS + s` on, which is room enough for all of its rows
before those of the next slot. A program without rows, or whose part has no rank there, ends at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import MAX_PLANS, TORCH_TO_TRITON, Launch, Layout, Specialisation, Target, current_target, varying
from .op import lora

FEW_ROWS, MANY_ROWS = 8, 64
"""Most rows of which each is a tile of its own, and the most rows of a tile."""
SPLIT_INPUTS, MAX_SPLITS = 512, 16
"""Fewest inputs of a split, and most splits: each program of `expand_kernel` reads the sums of all splits."""
RANKS, MAX_RANKS = 16, 64
"""Fewest and most rows of A in a block."""
MAX_HIDDEN = 32
"""Most hidden numbers of a row in a step of `expand_kernel`: registers hold them in float32, beside a tile of `out`."""
SLOTS, MAX_SLOTS = 16, 1024
"""Fewest slots for which the kernels are compiled, and the most that are listed."""
PARTS = 4
"""Parts of one launch of `expand_kernel`."""


@lora.register("cuda")
def lora_triton(
    out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Tensor,
    tokens: Tensor,
    starts: Tensor,
    part_ends: tuple[int, ...],
) -> None:
    """Runs `lora` in two launches, or in one more for each four parts after the first four.

    Raises:
        ValueError: The shapes do not match, or the rows of a matrix are not contiguous.
    """
    if not (len(tokens) and len(x)):
        return
    layouts = Layout.of(out), Layout.of(x), Layout.of(lora_a), Layout.of(lora_b)
    plan = _plan(layouts, tuple(part_ends), len(tokens), current_target())
    hidden = torch.empty(plan.hidden, dtype=torch.float32, device=x.device)
    plan.shrink.run(x, lora_a, ranks, tokens, starts, hidden)
    for expand in plan.expands:
        expand.run(out, lora_b, hidden, ranks, tokens, starts)


class _Plan(NamedTuple):
    """The launches of a call, and the shape of the hidden numbers: `[num_splits, num_parts, num_routed, max_rank]`."""

    hidden: tuple[int, int, int, int]
    shrink: Launch
    expands: tuple[Launch, ...]


@functools.lru_cache(MAX_PLANS)
def _plan(
    layouts: tuple[Layout, Layout, Layout, Layout], part_ends: tuple[int, ...], num_routed: int, target: Target
) -> _Plan:
    _check(*layouts, part_ends)
    out, x, lora_a, _ = layouts
    num_slots, num_parts, max_rank, in_features = lora_a.shape
    tile = configuration(TORCH_TO_TRITON[x.dtype], num_routed, num_slots, max_rank, target)
    num_tiles = num_routed // tile.rows + num_slots
    num_blocks = triton.cdiv(max_rank, tile.ranks)
    form = {"SLOTS": max(SLOTS, triton.next_power_of_2(num_slots)), "ROWS": tile.rows, "RANKS": tile.ranks}
    num_working = (num_routed // tile.rows + min(num_slots, num_routed)) * num_parts * num_blocks
    wanted = max(1, min(2 * target.num_processors // num_working, in_features // SPLIT_INPUTS, MAX_SPLITS))
    num_steps = triton.cdiv(in_features, tile.depth)
    split_steps = triton.cdiv(num_steps, wanted)
    num_splits = triton.cdiv(num_steps, split_steps)
    sizes = (num_routed, num_slots, num_parts, max_rank)
    shrink = Launch(
        shrink_kernel,
        (num_tiles, num_parts * num_blocks, num_splits),
        (*sizes, in_features, x.strides[0], split_steps),
        {**form, "DEPTH": tile.depth, **tile.shrink_options},
    )
    expands = tuple(
        Launch(
            expand_kernel,
            (num_tiles, sum(triton.cdiv(end - begin, tile.columns) for begin, end in pairwise(ends))),
            (*sizes, num_splits, out.shape[1], out.strides[0], first, *ends),
            {**_expand_constants(form, tile), **tile.expand_options},
        )
        for first, ends in _groups(part_ends)
    )
    return _Plan((num_splits, num_parts, num_routed, max_rank), shrink, expands)


def _check(out: Layout, x: Layout, lora_a: Layout, lora_b: Layout, part_ends: tuple[int, ...]) -> None:
    num_slots, num_parts, max_rank, in_features = lora_a.shape
    fits = lora_b.shape == (num_slots, max_rank, out.shape[1]) and x.shape == (out.shape[0], in_features)
    if not fits or len(part_ends) != num_parts or part_ends[-1] != out.shape[1]:
        raise ValueError(
            f"lora: x is {list(x.shape)} and out {list(out.shape)}, so lora_a must be [slots, {len(part_ends)} parts, "
            f"max_rank, {x.shape[1]}], lora_b [slots, max_rank, {out.shape[1]}] and the last end {out.shape[1]}; got "
            f"{list(lora_a.shape)}, {list(lora_b.shape)} and {part_ends[-1]}"
        )
    for matrix in (lora_a, lora_b):
        if matrix.strides != torch.empty(matrix.shape, device="meta").stride():
            raise ValueError("lora: lora_a and lora_b must be contiguous; call .contiguous() before")
    if x.strides[1] != 1 or out.strides[1] != 1:
        raise ValueError("lora: the rows of x and of out must be contiguous")


def _groups(part_ends: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields the first part of each launch of `expand_kernel`, and its PARTS + 1 bounds, the last of them repeated."""
    bounds = (0, *part_ends)
    for first in range(0, len(part_ends), PARTS):
        own = bounds[first : first + PARTS + 1]
        yield first, own + own[-1:] * (PARTS + 1 - len(own))


class Tile(NamedTuple):
    """The tiles of both kernels, and the options to compile them.

    Attributes:
        rows: Rows of x; 1 for sums without tensor cores.
        ranks: Rows of A.
        depth: Inputs of a step.
        columns: Columns of `out`.
        precision: The precision of products in float32.
        shrink_options: Options of `shrink_kernel`.
        expand_options: Options of `expand_kernel`.
    """

    rows: int
    ranks: int
    depth: int
    columns: int
    precision: str
    shrink_options: dict[str, Any]
    expand_options: dict[str, Any]


def configuration(dtype: str, num_routed: int, num_slots: int, max_rank: int, target: Target) -> Tile:
    """Returns the tiles for a number of rows that have an adapter. README.md has the reasons.

    float32 uses no tensor cores, and its tiles are limited by registers. In 16 bits the hidden numbers are kept in
    float32, and multiplied by B as tf32, in which B is exact.
    """
    is_wide, is_nvidia = dtype == "fp32", target.warp_size == 32
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    precision = "ieee" if is_wide or not is_nvidia else "tf32"
    if num_routed <= FEW_ROWS:
        return Tile(1, RANKS, 128 if is_wide else 256, 128, precision, options, options)
    if is_wide:
        return Tile(16, RANKS, 32, 64, precision, {**options, "num_stages": 2}, options)
    ranks = min(MAX_RANKS, max(RANKS, triton.next_power_of_2(max_rank)))
    shrink_options = {**options, "num_stages": 3 if is_nvidia else 2}
    if num_routed < MANY_ROWS * num_slots:
        return Tile(16, ranks, 128, 128, precision, shrink_options, options)
    return Tile(MANY_ROWS, ranks, 128, 128, precision, shrink_options, {**options, "num_warps": 8})


def _expand_constants(form: dict[str, int], tile: Tile) -> dict[str, Any]:
    ranks = min(tile.ranks, MAX_HIDDEN)
    return {**form, "RANKS": ranks, "COLUMNS": tile.columns, "PRECISION": tile.precision}


_LISTED = (
    (1, 1, SLOTS),
    (FEW_ROWS + 1, 1, SLOTS),
    (FEW_ROWS + 1, MAX_RANKS, SLOTS),
    (MANY_ROWS, 1, SLOTS),
    (MANY_ROWS, MAX_RANKS, MAX_SLOTS),
)
"""Numbers of rows, limits of ranks and numbers of slots that take the smallest and the largest form of every kind."""


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of both kernels on a target."""
    for dtype, (num_routed, max_rank, slots) in product(("fp32", "fp16", "bf16"), _LISTED):
        tile = configuration(dtype, num_routed, 1, max_rank, target)
        form = {"SLOTS": slots, "ROWS": tile.rows, "RANKS": tile.ranks}
        types = dict.fromkeys(("x_ptr", "lora_a_ptr"), f"*{dtype}") | _TYPES
        types |= dict.fromkeys(("in_features", "x_stride", "split_steps"), "i32")
        constants, options = {**form, "DEPTH": tile.depth}, tile.shrink_options
        multiples = ("max_rank", "in_features", "x_stride")
        yield Specialisation(shrink_kernel, types, constants, options, multiples, options["num_stages"] > 2)
        constants = _expand_constants(form, tile)
        bounds = tuple(f"bound_{i}" for i in range(PARTS + 1))
        others = ("max_rank", "out_features", "out_stride", *bounds)
        for out in dict.fromkeys((dtype, "fp32")):
            types = {"out_ptr": f"*{out}", "lora_b_ptr": f"*{dtype}"} | _TYPES
            types |= dict.fromkeys(("num_splits", "out_features", "out_stride", "first_part", *bounds), "i32")
            yield Specialisation(expand_kernel, types, constants, tile.expand_options, others)


_TYPES = dict.fromkeys(("ranks_ptr", "tokens_ptr", "starts_ptr"), "*i32") | {"hidden_ptr": "*fp32"}
_TYPES |= dict.fromkeys(("num_routed", "num_slots", "num_parts", "max_rank"), "i32")
_LISTS = ["tokens_ptr", "starts_ptr"]


@triton.jit(**varying(sizes=["num_routed", "num_slots", "num_parts", "split_steps"], pointers=_LISTS))
def shrink_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    lora_a_ptr,
    ranks_ptr,
    tokens_ptr,
    starts_ptr,
    hidden_ptr,
    num_routed,
    num_slots,
    num_parts,
    max_rank,
    in_features,
    x_stride,
    split_steps,
    SLOTS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    RANKS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
):
    """Computes the hidden numbers of a tile of rows for RANKS rows of a part's A, over the inputs of one split."""
    slot, first, end = _rows_of_tile(starts_ptr, tl.program_id(0), num_slots, SLOTS, ROWS)
    num_blocks = tl.cdiv(max_rank, RANKS)
    part, block = tl.program_id(1) // num_blocks, tl.program_id(1) % num_blocks
    rank = tl.load(ranks_ptr + slot * num_parts + part)
    if (first >= end) | (block * RANKS >= rank):
        return
    row, line, inner = first + tl.arange(0, ROWS), block * RANKS + tl.arange(0, RANKS), tl.arange(0, DEPTH)
    token = tl.load(tokens_ptr + row, mask=row < end, other=0)
    x_ptrs = x_ptr + token[:, None].to(tl.int64) * x_stride + inner[None, :]
    a_line = (slot * num_parts + part).to(tl.int64) * max_rank + line
    a_ptrs = lora_a_ptr + a_line[:, None] * in_features + inner[None, :]
    begin = tl.program_id(2) * split_steps * DEPTH
    stop = tl.minimum(begin + split_steps * DEPTH, in_features)
    if ROWS == 1:
        sums = tl.zeros((RANKS, DEPTH), tl.float32)
        for start in range(begin, stop, DEPTH):
            is_inside = inner[None, :] < stop - start
            x = tl.load(x_ptrs + start, mask=is_inside, other=0.0)
            a = tl.load(a_ptrs + start, mask=is_inside & (line[:, None] < rank), other=0.0)
            sums += x.to(tl.float32) * a.to(tl.float32)
        total = tl.sum(sums, axis=1)[None, :]
    else:
        total = tl.zeros((ROWS, RANKS), tl.float32)
        for start in range(begin, stop, DEPTH):
            is_inside = inner[None, :] < stop - start
            x = tl.load(x_ptrs + start, mask=is_inside & (row[:, None] < end), other=0.0)
            a = tl.load(a_ptrs + start, mask=is_inside & (line[:, None] < rank), other=0.0)
            total = tl.dot(x, tl.trans(a), total, input_precision="ieee")
    hidden_row = (tl.program_id(2) * num_parts + part).to(tl.int64) * num_routed + row
    hidden_ptrs = hidden_ptr + hidden_row[:, None] * max_rank + line[None, :]
    tl.store(hidden_ptrs, total, mask=(row[:, None] < end) & (line[None, :] < rank))


@triton.jit(**varying(sizes=["num_routed", "num_slots", "num_parts", "num_splits", "first_part"], pointers=_LISTS))
def expand_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    lora_b_ptr,
    hidden_ptr,
    ranks_ptr,
    tokens_ptr,
    starts_ptr,
    num_routed,
    num_slots,
    num_parts,
    max_rank,
    num_splits,
    out_features,
    out_stride,
    first_part,
    bound_0,
    bound_1,
    bound_2,
    bound_3,
    bound_4,
    SLOTS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    RANKS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Adds the product of the hidden numbers with a part's B to a tile of `out`."""
    slot, first, end = _rows_of_tile(starts_ptr, tl.program_id(0), num_slots, SLOTS, ROWS)
    part, tile, begin, stop = first_part, tl.program_id(1), bound_0, bound_1
    part, tile, begin, stop = _part_after(part, tile, begin, stop, bound_2, COLUMNS)
    part, tile, begin, stop = _part_after(part, tile, begin, stop, bound_3, COLUMNS)
    part, tile, begin, stop = _part_after(part, tile, begin, stop, bound_4, COLUMNS)
    rank = tl.load(ranks_ptr + slot * num_parts + part)
    if (first >= end) | (rank == 0):
        return
    row, column = first + tl.arange(0, ROWS), begin + tile * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_column, inner = row[:, None] < end, column < stop, tl.arange(0, RANKS)
    hidden_ptrs = hidden_ptr + (part.to(tl.int64) * num_routed + row)[:, None] * max_rank + inner[None, :]
    split_stride = num_parts.to(tl.int64) * num_routed * max_rank
    b_line = slot.to(tl.int64) * max_rank + inner
    b_ptrs = lora_b_ptr + b_line[:, None] * out_features + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANKS):
        is_inside = inner < rank - start
        hidden = tl.zeros((ROWS, RANKS), tl.float32)
        for split in range(num_splits):
            hidden += tl.load(hidden_ptrs + split * split_stride + start, mask=has_row & is_inside[None, :], other=0.0)
        b = tl.load(b_ptrs + start * out_features, mask=is_inside[:, None] & has_column[None, :], other=0.0)
        if ROWS == 1:
            total += tl.sum(tl.trans(hidden) * b.to(tl.float32), axis=0)[None, :]
        else:
            total = tl.dot(hidden, b.to(tl.float32), total, input_precision=PRECISION)
    token = tl.load(tokens_ptr + row, mask=row < end, other=0)
    out_ptrs = out_ptr + token[:, None].to(tl.int64) * out_stride + column[None, :]
    mask = has_row & has_column[None, :]
    total += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows_of_tile(starts_ptr, tile, num_slots, SLOTS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns the slot of a tile, its first row, and the end of the rows of the slot, which may be before that."""
    index = tl.arange(0, SLOTS)
    first_tile = tl.load(starts_ptr + index, mask=index < num_slots, other=0) // ROWS + index
    slot = tl.sum(((first_tile <= tile) & (index < num_slots)).to(tl.int32), axis=0) - 1
    start = tl.load(starts_ptr + slot)
    return slot, start + (tile - start // ROWS - slot) * ROWS, tl.load(starts_ptr + slot + 1)


@triton.jit
def _part_after(part, tile, begin, stop, bound, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns a part, the tile in it and the part's columns; those of the next part if the tile is behind this one."""
    num_tiles = tl.cdiv(stop - begin, COLUMNS)
    is_behind = tile >= num_tiles
    return (
        tl.where(is_behind, part + 1, part),
        tl.where(is_behind, tile - num_tiles, tile),
        tl.where(is_behind, stop, begin),
        tl.where(is_behind, bound, stop),
    )
