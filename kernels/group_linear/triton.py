"""The linear layer of integers in groups on the GPU, in Triton.

    out[t, n] = Σ_k x[t, k] · (code[n, k] - zero[n, k // g]) · scale[n, k // g]  +  bias[n]

`product_kernel`, grid (tiles of the result x splits of the inputs). A step reads one block of the layout, 64 bytes of
each of its rows, and makes the left operand of the matrix unit out of it: `code - zero`, which is exact in 16 bits. The
sums of a group are scaled in float32. So a program computes the transpose of a tile, outputs by rows of x: the unit
takes 64 outputs at a time from registers, and as few as 16 rows of x.

A grid of few tiles would leave most of the GPU idle. Then the inputs are split, every split writes its sums in float32,
and `sum_kernel` adds them up in order. The number of splits follows from shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import MAX_PLANS, TORCH_TO_TRITON, Launch, Layout, Specialisation, Target, current_target
from .layout import BLOCK_HALVES, by_groups, codes_per_block
from .op import group_linear

FEWEST_ROWS, FEW_ROWS, MANY_ROWS = 4, 16, 64
"""Most rows of x for which a kind of tile is chosen; see `configuration`."""
LARGE_GROUP = 128
"""Groups of a multiple of this many inputs take the largest tile."""
ALL = 1 << 30
"""The size of a group of all inputs, as it is compiled in."""
MIN_STEPS = 4
"""Fewest steps of a split: with fewer, the loop ends before its copies run ahead."""
BAND = 8
"""Row tiles that run side by side, so that they read weights from the L2 cache after the first of them."""
SUM_BLOCK = 256

_SUM = {"num_warps": 4, "enable_fp_fusion": True}


@group_linear.register("cuda")
def group_linear_triton(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Runs `group_linear` in one launch, or in two where the inputs are split.

    Scales and zeros are read fastest in the layout of `by_groups`; they are copied into it in every call otherwise.

    Raises:
        ValueError: The shapes do not match, groups are no multiples of 32 inputs, or a matrix is not contiguous.
    """
    _check(x, weight, scales, bits)
    plan = _plan(Layout.of(x), len(weight), scales.shape[1], bits, current_target())
    scales, zeros = by_groups(scales), None if zeros is None else by_groups(zeros)
    if (x.dtype, scales.dtype) not in _SCALES:
        scales = scales.float()
    out = torch.empty(len(x), len(weight), dtype=dtype or x.dtype, device=x.device)
    if not out.numel():
        return out
    if plan.num_splits == 1 and (bias is None or out.dtype == x.dtype):
        plan.product.run(x, weight, scales, zeros, bias, out)
        return out
    parts = torch.empty(plan.num_splits, *out.shape, dtype=torch.float32, device=x.device)
    plan.product.run(x, weight, scales, zeros, None, parts)
    plan.sum.run(parts, bias, out)
    return out


def _check(x: Tensor, weight: Tensor, scales: Tensor, bits: int) -> None:
    in_features, (out_features, num_groups) = x.shape[1], scales.shape
    words = -(-in_features // codes_per_block(bits)) * BLOCK_HALVES // 2
    if weight.shape != (out_features, words):
        raise ValueError(
            f"group_linear: x is {list(x.shape)} and scales are {list(scales.shape)}, so a weight of {bits} bits must "
            f"be [{out_features}, {words}]; got {list(weight.shape)}"
        )
    if in_features % num_groups or (num_groups > 1 and in_features // num_groups % BLOCK_HALVES):
        raise ValueError(
            f"group_linear: {num_groups} groups of {in_features} inputs are not supported on a GPU: a group must be a "
            f"multiple of {BLOCK_HALVES} inputs, or all of them"
        )
    if x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError("group_linear: the rows of x and the weight must be contiguous; call .contiguous() before")


class _Plan(NamedTuple):
    """The launches of a call. With one split there is nothing to add up."""

    num_splits: int
    product: Launch
    sum: Launch


@functools.lru_cache(MAX_PLANS)
def _plan(x: Layout, out_features: int, num_groups: int, bits: int, target: Target) -> _Plan:
    num_rows, in_features = x.shape
    group_size = ALL if num_groups == 1 else in_features // num_groups
    tile, options = configuration(TORCH_TO_TRITON[x.dtype], num_rows, group_size, target)
    num_tiles = triton.cdiv(num_rows, tile["ROWS"]) * triton.cdiv(out_features, tile["COLUMNS"])
    num_steps = triton.cdiv(in_features, codes_per_block(bits))
    wanted = programs_per_processor(tile) * target.num_processors // max(num_tiles, 1)
    split_steps = triton.cdiv(num_steps, max(1, min(wanted, num_steps // MIN_STEPS)))
    num_splits = triton.cdiv(num_steps, split_steps)
    values = (num_rows, in_features, out_features, num_groups, x.strides[0], split_steps)
    form = _constants(TORCH_TO_TRITON[x.dtype], bits, group_size, target)
    sums = Launch(product_kernel, (num_tiles, num_splits), values, {**form, **tile, **options})
    grid = (triton.cdiv(num_rows * out_features, SUM_BLOCK),)
    total = Launch(sum_kernel, grid, (num_splits, num_rows * out_features, out_features), {"BLOCK": SUM_BLOCK, **_SUM})
    return _Plan(num_splits, sums, total)


def configuration(dtype: str, num_rows: int, group_size: int, target: Target) -> tuple[dict[str, int], dict[str, Any]]:
    """Returns the tile (`ROWS` of x by `COLUMNS` outputs) and the options of the product.

    Up to 16 rows, reading takes the time. 64 outputs are then the fewest of a tensor core; twice as many read x half as
    often, which counts from a few rows on. With more rows a tile is as large as registers allow: the sums of several
    groups in a step need more of them. float32 uses no tensor cores. README.md has the figures.
    """
    options = {"num_stages": 4 if target.warp_size == 32 else 2, "enable_fp_fusion": True}
    if dtype == "fp32":
        tile, num_warps = {"ROWS": 16, "COLUMNS": 32}, 4
        options["num_stages"] = 2
    elif num_rows <= FEWEST_ROWS:
        tile, num_warps = {"ROWS": 16, "COLUMNS": 64}, 2
    elif num_rows <= FEW_ROWS:
        tile, num_warps = {"ROWS": 16, "COLUMNS": 128}, 4
    elif num_rows <= MANY_ROWS or group_size % LARGE_GROUP:
        tile, num_warps = {"ROWS": 64, "COLUMNS": 128}, 8
    else:
        tile, num_warps = {"ROWS": 128, "COLUMNS": 128}, 8
    return tile, {"num_warps": num_warps, **options}


def programs_per_processor(tile: dict[str, int]) -> int:
    """Returns the programs that keep a multiprocessor's bandwidth, or its matrix unit, busy.

    A program has three steps on their way, of 64 bytes for each output. 48 KiB are the bandwidth of an H200, 36 GB/s a
    multiprocessor, times a latency of 1.3 microseconds.
    """
    return 256 // tile["COLUMNS"] if tile["ROWS"] == 16 else 1


def _constants(dtype: str, bits: int, group_size: int, target: Target) -> dict[str, Any]:
    """Returns the compile-time arguments of the product, without the tile.

    Two codes are made at once where they have room in 16 bits, by instructions of NVIDIA; see `_packed_codes`.
    """
    has_room = dtype == "fp16" or (dtype == "bf16" and bits == 4)
    is_packed = has_room and target.warp_size == 32 and not triton.knobs.runtime.interpret
    return {"BITS": bits, "GROUP_SIZE": group_size, "PACKED": is_packed, "HALVES": BLOCK_HALVES, "BAND": BAND}


_SCALES = (
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
)
"""Pairs of the dtypes of x and of scales for which there is a form. Other scales are converted to float32."""


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of both kernels on a target."""
    for dtype, scale in ((TORCH_TO_TRITON[dtype], TORCH_TO_TRITON[scale]) for dtype, scale in _SCALES):
        for num_rows in (1,) if dtype == "fp32" else (FEWEST_ROWS, FEW_ROWS, MANY_ROWS, MANY_ROWS + 1):
            smallest = LARGE_GROUP if num_rows > MANY_ROWS else BLOCK_HALVES
            for bits, group_size in product((4, 8), (smallest, ALL)):
                tile, options = configuration(dtype, num_rows, group_size, target)
                constants = _constants(dtype, bits, group_size, target) | tile
                yield from _product_forms(dtype, scale, constants, options)
    for out in ("fp32", "fp16", "bf16"):
        for bias in {"fp32": (None, "fp32", "fp16", "bf16")}.get(out, (None, out)):
            types = {"parts_ptr": "*fp32", "bias_ptr": f"*{bias}", "out_ptr": f"*{out}"}
            types |= dict.fromkeys(("num_splits", "size", "out_features"), "i32")
            yield _form(sum_kernel, types, {"BLOCK": SUM_BLOCK}, _SUM, ("out_features",), () if bias else ("bias_ptr",))


def _product_forms(dtype: str, scale: str, form: dict[str, Any], options: dict[str, Any]) -> Iterator[Specialisation]:
    """Yields the forms of a product: with zeros or none, to its dtype with a bias or none, or to sums in float32."""
    sizes = ("in_features", "out_features", "x_stride")
    for out in dict.fromkeys((dtype, "fp32")):
        types = {"x_ptr": f"*{dtype}", "weight_ptr": "*i32", "scales_ptr": f"*{scale}", "zeros_ptr": "*u8"}
        types |= {"bias_ptr": f"*{dtype}", "out_ptr": f"*{out}"}
        types |= dict.fromkeys(("num_rows", *sizes, "num_groups", "split_steps"), "i32")
        for no_zeros in ((), ("zeros_ptr",)):
            for no_bias in ((), ("bias_ptr",)) if out == dtype else (("bias_ptr",),):
                yield _form(product_kernel, types, form, options, sizes, (*no_zeros, *no_bias))


def _form(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    sizes: tuple[str, ...],
    absent: tuple[str, ...],
) -> Specialisation:
    present = {name: kind for name, kind in types.items() if name not in absent}
    # The tiles of more than two stages must be copied ahead. AMD's compiler does that without copies of its own.
    is_ahead = options.get("num_stages", 0) > 2
    return Specialisation(kernel, present, {**constants, **dict.fromkeys(absent)}, options, sizes, is_ahead)


@triton.jit(do_not_specialize=["num_rows", "num_groups", "split_steps"])
def product_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    in_features,
    out_features,
    num_groups,
    x_stride,
    split_steps,
    BITS: tl.constexpr,  # noqa: N803
    GROUP_SIZE: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803
    HALVES: tl.constexpr,  # noqa: N803
    BAND: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Computes a tile of one split's sums.

    A block falls into runs of places, each in one group: one run, two, or as many as places.
    """
    PLACES: tl.constexpr = 16 // BITS  # noqa: N806
    RUN: tl.constexpr = _places_of_a_run(GROUP_SIZE, PLACES, HALVES)  # noqa: N806
    row_tile, column_tile = _tile(tl.program_id(0), num_rows, out_features, ROWS, COLUMNS, BAND)
    row, column = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    has_row, inner = row[None, :] < num_rows, tl.arange(0, HALVES)
    own = tl.minimum(column, out_features - 1)  # The rest of a tile repeats the last output, and is not stored.
    num_steps = tl.cdiv(in_features, PLACES * HALVES)
    width = num_steps * (HALVES // 2)
    weight_ptrs = weight_ptr + own[:, None].to(tl.int64) * width + tl.arange(0, HALVES // 2)[None, :]
    x_ptrs = x_ptr + row[None, :].to(tl.int64) * x_stride + inner[:, None]
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    first = tl.program_id(1) * split_steps
    for step in range(first, tl.minimum(first + split_steps, num_steps)):
        words = tl.load(weight_ptrs + step * (HALVES // 2))
        for place in tl.static_range(0, PLACES, RUN):
            group = tl.minimum((step * PLACES + place) * HALVES // GROUP_SIZE, num_groups - 1)
            of_group = group.to(tl.int64) * out_features + own
            scale = tl.load(scales_ptr + of_group).to(tl.float32)
            zero = tl.full((COLUMNS,), 1 << (BITS - 1), tl.int32)
            if zeros_ptr is not None:
                zero = tl.load(zeros_ptr + of_group).to(tl.int32)
            part = tl.zeros((COLUMNS, ROWS), tl.float32)
            for i in tl.static_range(place, place + RUN):
                start = (step * PLACES + i) * HALVES
                x = tl.load(x_ptrs + start, mask=has_row & (inner[:, None] < in_features - start), other=0.0)
                if PACKED:
                    codes = _packed_codes(words, zero, i * BITS, BITS, x.dtype)
                else:
                    codes = _codes(words, zero, i * BITS, BITS, x.dtype)
                part = tl.dot(codes, x, part, input_precision="ieee")
            total += part * scale[:, None]
    has_column = column[:, None] < out_features
    if bias_ptr is not None:
        total += tl.load(bias_ptr + own).to(tl.float32)[:, None]
    out_row = (tl.program_id(1).to(tl.int64) * num_rows + row)[None, :]
    out_ptrs = out_ptr + out_row * out_features + column[:, None]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=has_row & has_column)


@triton.constexpr_function
def _places_of_a_run(group_size, num_places, num_halves):  # type: ignore[no-untyped-def]
    """Returns the number of places of a block that are always in one group."""
    return math.gcd(group_size // num_halves, num_places)


@triton.jit
def _tile(program, num_rows, out_features, ROWS, COLUMNS, BAND):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns the numbers of a program's row tile and column tile. Programs run through bands, column by column."""
    per_band = BAND * tl.cdiv(out_features, COLUMNS)
    first = program // per_band * BAND
    height = tl.minimum(tl.cdiv(num_rows, ROWS) - first, BAND)
    return first + program % per_band % height, program % per_band // height


@triton.jit
def _codes(words, zero, SHIFT: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns `code - zero` of one place of the halves of a block, `[COLUMNS, HALVES]`.

    The bits of a code are put below the exponent of 2**23 in float32, which is that code more than 2**23.
    """
    MASK: tl.constexpr = (1 << BITS) - 1  # noqa: N806
    base = (zero + 0x4B000000).to(tl.float32, bitcast=True)[:, None]
    low = ((words >> SHIFT) & MASK | 0x4B000000).to(tl.float32, bitcast=True) - base
    high = ((words >> (16 + SHIFT)) & MASK | 0x4B000000).to(tl.float32, bitcast=True) - base
    return _side_by_side(low.to(dtype), high.to(dtype))


@triton.jit
def _packed_codes(words, zero, SHIFT: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns what `_codes` does, of which three instructions make two numbers in one register.

    The exponent is that of 2**7 in bfloat16, or 2**10 in float16. Then `-(2**7 + zero)` is added, which is exact.
    """
    bases = (zero + (0xC300 if dtype == tl.bfloat16 else 0xE400)) * 0x10001
    shifted = words >> SHIFT
    if dtype == tl.bfloat16:
        pairs = tl.inline_asm_elementwise(
            """{ .reg .b32 pair, one; mov.b32 one, 0x3f803f80;
            lop3.b32 pair, $1, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, pair, one, $2; }""",
            "=r,r,r",
            [shifted, bases[:, None]],
            tl.int32,
            True,
            1,
        )
    elif BITS == 4:
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 pair; lop3.b32 pair, $1, 0x000f000f, 0x64006400, 0xea; add.rn.f16x2 $0, pair, $2; }",
            "=r,r,r",
            [shifted, bases[:, None]],
            tl.int32,
            True,
            1,
        )
    else:
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 pair; lop3.b32 pair, $1, 0x00ff00ff, 0x64006400, 0xea; add.rn.f16x2 $0, pair, $2; }",
            "=r,r,r",
            [shifted, bases[:, None]],
            tl.int32,
            True,
            1,
        )
    low, high = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
    return _side_by_side(low.to(dtype, bitcast=True), high.to(dtype, bitcast=True))


@triton.jit
def _side_by_side(low, high):  # type: ignore[no-untyped-def]
    """Returns the columns of two matrices in turns: those of the low and of the high half of each word."""
    return tl.join(low, high).reshape(low.shape[0], 2 * low.shape[1])


@triton.jit(do_not_specialize=["num_splits", "size"])
def sum_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    bias_ptr,
    out_ptr,
    num_splits,
    size,
    out_features,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Adds up the sums of the splits in order, for BLOCK of the `size` elements of the result."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = index < size
    total = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + index % out_features, mask=is_inside, other=0.0).to(tl.float32)
    part_ptrs = parts_ptr + index
    for _ in range(num_splits):
        total += tl.load(part_ptrs, mask=is_inside, other=0.0)
        part_ptrs += size
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=is_inside)
