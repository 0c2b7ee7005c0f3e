"""The product of rows and a matrix of 8-bit numbers on the GPU, in Triton, for `scaled_int8_linear` and `fp8_linear`.

    out[t, n] = x_scale[t] · weight_scale[n] · Σ_k x[t, k] · weight[n, k]  +  bias[n]
    out[t, n] = Σ_g x_scale[t, g] · weight_scale[g, n] · Σ_(k in g) x[t, k] · weight[n, k]  +  bias[n]

In the first line each row of a matrix has one scale, and the sum is scaled at its end. In the second, each `GROUP`
columns of a row have a scale, and a step of the loop is in one group, so every step is scaled before it is added. Sums
are of int32 or float32. Rows without scales are in the dtype of the model; the weight is widened to it in registers.

`scaled_product_kernel`, grid (tiles of the result x splits): a program multiplies the steps of its split of k. If there
are few rows, there are few tiles, so the sums are split until the programs fill the GPU; otherwise there is one split.
`merge_splits_kernel`, grid (rows x 1,024 columns): adds up the splits. Integers are scaled after that, so their result
does not depend on the number of splits, which depends on the number of rows.

Tiles are numbered column by column within bands of `BAND` row tiles, so that programs which run at the same time share
rows of both matrices in the L2 cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fp8 import e4m3_storage, has_e4m3, widen
from ._triton import MAX_PLANS, TORCH_TO_TRITON, Launch, Layout, Specialisation, Target
from .fp8_linear.op import GROUP

MAX_SPLITS = 16
MIN_STEPS = 4
"""The fewest steps of a split: a program needs some to have its copies under way."""

BAND = 8
MERGE_BLOCK = 1024
_BAND, _GROUP = tl.constexpr(BAND), tl.constexpr(GROUP)
_MERGE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def scaled_product(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    target: Target,
) -> Tensor:
    """Multiplies rows by a matrix of 8-bit numbers in one kernel, or in two if the sums are split.

    Args:
        x: `[num_rows, in_features]` in the dtype of the weight with scales, or in any other floating dtype without.
        x_scale: `[num_rows, num_groups]` float32, contiguous, or None.
        weight: `[out_features, in_features]` int8 or float8_e4m3fn.
        weight_scale: `[num_groups, out_features]` float32, contiguous; num_groups is 1, or there is one for each
            `GROUP` columns.
        bias: `[out_features]` or None for 0.
        dtype: The dtype of the result.
        target: The GPU.

    Raises:
        ValueError: The rows of x or the weight are not contiguous.
    """
    if x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError("the rows of x and the weight must be contiguous; call .contiguous() before")
    out = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    if x.dtype == torch.float8_e4m3fn and not has_e4m3(target):
        x = x.half()  # This is exact.
    plan, weight = _plan(Layout.of(x), len(weight), len(weight_scale) > 1, target), e4m3_storage(weight, target)
    if plan.merge is None:
        plan.product.run(x, x_scale, weight, weight_scale, bias, out)
        return out
    sum_type = torch.int32 if weight.dtype == torch.int8 else torch.float32
    parts = torch.empty((plan.num_splits, *out.shape), dtype=sum_type, device=x.device)
    plan.product.run(x, x_scale, weight, weight_scale, None, parts)
    scales = (None, None) if len(weight_scale) > 1 else (x_scale, weight_scale)
    plan.merge.run(parts, *scales, bias, out)
    return out


class _Plan(NamedTuple):
    """The launches of a call; one without `merge` has no splits."""

    num_splits: int
    product: Launch
    merge: Launch | None


@functools.lru_cache(MAX_PLANS)
def _plan(x: Layout, num_outputs: int, by_group: bool, target: Target) -> _Plan:
    num_rows, num_inputs = x.shape
    tile, options = configuration(TORCH_TO_TRITON[x.dtype], by_group, num_rows, target)
    num_tiles = triton.cdiv(num_rows, tile["ROWS"]) * triton.cdiv(num_outputs, tile["COLUMNS"])
    num_splits = split_count(num_tiles, triton.cdiv(num_inputs, tile["DEPTH"]), target)
    constants = {"BY_GROUP": by_group, "IS_SPLIT": num_splits > 1, **tile}
    values = (num_rows, num_inputs, num_outputs, x.strides[0])
    product = Launch(scaled_product_kernel, (num_tiles, num_splits), values, {**constants, **options})
    if num_splits == 1:
        return _Plan(1, product, None)
    grid = (num_rows, triton.cdiv(num_outputs, MERGE_BLOCK))
    merge_options = {"BLOCK": MERGE_BLOCK, **_MERGE_OPTIONS}
    return _Plan(num_splits, product, Launch(merge_splits_kernel, grid, (num_splits, num_outputs), merge_options))


def split_count(num_tiles: int, num_steps: int, target: Target) -> int:
    """Returns the number of splits: as many as two programs for each multiprocessor, of at least four steps each."""
    most = min(2 * target.num_processors // num_tiles, num_steps // MIN_STEPS, MAX_SPLITS)
    return 1 << max(most, 1).bit_length() - 1


def configuration(x_type: str, by_group: bool, num_rows: int, target: Target) -> tuple[dict[str, int], dict[str, Any]]:
    """Returns the tile (`ROWS` x `COLUMNS`, `DEPTH` inputs per step) and the options to compile and launch it.

    16 rows are the least of a tensor core; the loop then has to keep enough bytes of the weight in flight. A square of
    128 is the smallest with which the bandwidth of L2 keeps the tensor cores busy. float32 uses no tensor cores, and
    registers limit its tile. A step is never longer than a group. Groups take a second sum in registers, and a GPU
    without e4m3 widens the weight in registers; both together take more threads, or a narrower tile.
    """
    is_nvidia = target.warp_size == 32
    if x_type == "fp32":
        tile = {"ROWS": 16 if num_rows <= 16 else 64, "COLUMNS": 32, "DEPTH": 32}
        return tile, {"num_warps": 8 if by_group else 4, "num_stages": 2, "enable_fp_fusion": True}
    is_wide = by_group and not has_e4m3(target)
    depth = GROUP if x_type not in ("fp16", "bf16") else GROUP // 2
    if num_rows <= 64:
        tile = {"ROWS": 16 if num_rows <= 16 else 64, "COLUMNS": 64, "DEPTH": depth}
        num_warps = 8 if is_wide and is_nvidia and num_rows > 16 else 4
        return tile, {"num_warps": num_warps, "num_stages": 4 if is_nvidia else 2, "enable_fp_fusion": True}
    tile = {"ROWS": 128, "COLUMNS": 64 if is_wide else 128, "DEPTH": depth}
    return tile, {"num_warps": 8, "num_stages": 3 if is_nvidia else 2, "enable_fp_fusion": True}


class Types(NamedTuple):
    """Triton's names of the element types of a product; scales of rows are "" if there are none."""

    x: str
    x_scale: str
    weight: str
    bias: str
    out: str


def product_specialisations(target: Target, types: Types, by_group: bool) -> Iterator[Specialisation]:
    """Yields the forms of both kernels for some types: each height of a tile, with a bias or none, split or not."""
    sizes = ("num_inputs", "num_outputs", "x_stride")
    sums = "i32" if types.weight == "i8" else "fp32"
    pointers = {"x_ptr": types.x, "x_scale_ptr": types.x_scale, "weight_ptr": types.weight, "weight_scale_ptr": "fp32"}
    for num_rows in (16, 64, 128):
        tile, options = configuration(types.x, by_group, num_rows, target)
        for bias, out, is_split in ((types.bias, types.out, False), ("", types.out, False), ("", sums, True)):
            named = {**pointers, "bias_ptr": bias, "out_ptr": out}
            constants = {"BY_GROUP": by_group, "IS_SPLIT": is_split, **tile, **_absent(named)}
            present = _present(named) | dict.fromkeys(("num_rows", *sizes), "i32")
            overlaps = target.warp_size == 32 and types.x != "fp32"
            yield Specialisation(scaled_product_kernel, present, constants, options, sizes, overlaps)
    scales = ("", "") if by_group else (types.x_scale, "fp32")
    for bias in (types.bias, ""):
        named = dict(
            zip(("parts_ptr", "x_scale_ptr", "weight_scale_ptr"), (sums, *scales), strict=True),
            bias_ptr=bias,
            out_ptr=types.out,
        )
        present = _present(named) | dict.fromkeys(("num_splits", "num_outputs"), "i32")
        constants = {"BLOCK": MERGE_BLOCK, **_absent(named)}
        yield Specialisation(merge_splits_kernel, present, constants, _MERGE_OPTIONS, ("num_outputs",))


def _present(types: dict[str, str]) -> dict[str, str]:
    return {name: f"*{kind}" for name, kind in types.items() if kind}


def _absent(types: dict[str, str]) -> dict[str, None]:
    return {name: None for name, kind in types.items() if not kind}


@triton.jit(do_not_specialize=["num_rows"])
def scaled_product_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_inputs,
    num_outputs,
    x_stride,
    BY_GROUP: tl.constexpr,  # noqa: N803
    IS_SPLIT: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
):
    """Computes one tile of the result, or of the part of it that split `program_id(1)` adds."""
    row, column = _tile(tl.program_id(0), num_rows, num_outputs, ROWS, COLUMNS)
    has_row, has_column = row < num_rows, column < num_outputs
    inner = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + row[:, None].to(tl.int64) * x_stride + inner[None, :]
    weight_ptrs = weight_ptr + column[None, :].to(tl.int64) * num_inputs + inner[:, None]
    sum_type: tl.constexpr = tl.int32 if weight_ptr.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros((ROWS, COLUMNS), dtype=sum_type)
    per_split = tl.cdiv(tl.cdiv(num_inputs, DEPTH), tl.num_programs(1)) * DEPTH
    first = tl.program_id(1) * per_split
    for start in range(first, min(first + per_split, num_inputs), DEPTH):
        left = num_inputs - start
        x = tl.load(x_ptrs + start, mask=has_row[:, None] & (inner[None, :] < left), other=0.0)
        weight = tl.load(weight_ptrs + start, mask=has_column[None, :] & (inner[:, None] < left), other=0.0)
        if BY_GROUP:
            group = start // _GROUP
            part = _multiply(x, weight, tl.zeros((ROWS, COLUMNS), dtype=sum_type))
            scale = tl.load(weight_scale_ptr + group * num_outputs + column, mask=has_column, other=0.0)
            total += part * scale[None, :] * _row_scales(x_scale_ptr, row, group, num_rows, num_inputs)
        else:
            total = _multiply(x, weight, total)
    places = row[:, None].to(tl.int64) * num_outputs + column[None, :]
    if IS_SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * num_rows * num_outputs
        out = total
    else:
        out = total.to(tl.float32)
        if not BY_GROUP:
            scale = tl.load(weight_scale_ptr + column, mask=has_column, other=0.0)
            out *= scale[None, :] * _row_scales(x_scale_ptr, row, 0, num_rows, 1)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + column, mask=has_column, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=has_row[:, None] & has_column[None, :])


@triton.jit
def _tile(program, num_rows, num_outputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns the rows and the columns of a tile by its number."""
    per_band = _BAND * tl.cdiv(num_outputs, COLUMNS)
    first_row_tile = program // per_band * _BAND
    height = min(tl.cdiv(num_rows, ROWS) - first_row_tile, _BAND)
    row = (first_row_tile + program % per_band % height) * ROWS + tl.arange(0, ROWS)
    return row, program % per_band // height * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _row_scales(x_scale_ptr, row, group, num_rows, num_inputs):  # type: ignore[no-untyped-def]
    """Returns the scales of rows in a group, as a column; 1 for rows without scales."""
    if x_scale_ptr is None:
        scale = tl.full((1, 1), 1.0, tl.float32)
    else:
        place = row.to(tl.int64) * tl.cdiv(num_inputs, _GROUP) + group
        scale = tl.load(x_scale_ptr + place, mask=row < num_rows, other=0.0)[:, None]
    return scale


@triton.jit
def _multiply(x, weight, total):  # type: ignore[no-untyped-def]
    """Adds x · weight to a sum. A weight of 8-bit floats is widened, exactly, to the type of plain rows."""
    if x.dtype == tl.int8:
        total = tl.dot(x, weight, total, out_dtype=tl.int32)
    elif x.dtype == tl.float8e4nv:
        total = tl.dot(x, weight, total)
    else:
        total = tl.dot(x, widen(weight, x.dtype), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    num_splits,
    num_outputs,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Adds up the splits of BLOCK columns of one row, and scales the sum if it is not scaled yet."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    has_column = column < num_outputs
    size = tl.num_programs(0).to(tl.int64) * num_outputs
    total = tl.zeros([BLOCK], dtype=parts_ptr.dtype.element_ty)
    for split in range(num_splits):
        total += tl.load(parts_ptr + split * size + row * num_outputs + column, mask=has_column, other=0)
    out = total.to(tl.float32)
    if weight_scale_ptr is not None:
        out *= tl.load(weight_scale_ptr + column, mask=has_column, other=0.0)
        if x_scale_ptr is not None:
            out *= tl.load(x_scale_ptr + row)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column, mask=has_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * num_outputs + column, out.to(out_ptr.dtype.element_ty), mask=has_column)
