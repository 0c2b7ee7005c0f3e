"""Quantisation of rows to 8 bits on the GPU, in Triton.

    scale = max|row| / 448  (1 for a row of zeros),   q = round_e4m3(clamp(row / scale, -448, 448))

`quantize_fp8_kernel`, grid: one program per row. A program keeps the first 16,384 numbers of its row in registers,
which is the whole row as a rule. It reads the rest of a longer row twice, the second time from the L2 cache.

`quantize_groups_kernel`, grid (rows x 2,048 columns): each group of columns has a scale. A program has whole groups.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._fp8 import e4m3_storage, e4m3_type, narrow, row_scale
from .._rows import LISTED_SIZES, as_rows, long_row_tile, row_options
from .._triton import MAX_PLANS, Launch, Specialisation, Target, current_target
from .op import quantize_fp8

GROUPS_TILE = 2048
"""Columns of a program of `quantize_groups_kernel`."""


@quantize_fp8.register("cuda")
def quantize_fp8_triton(
    x: Tensor, scale: Tensor | None = None, *, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Runs `quantize_fp8` in one kernel.

    Raises:
        ValueError: The group size is not a power of two up to 2,048.
    """
    target, rows = current_target(), as_rows(x)
    if scale is not None:
        group_size = None
    launch = _plan(rows.shape, rows.stride(0), group_size, target)
    num_groups = 1 if group_size is None else triton.cdiv(x.shape[-1], group_size)
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((*x.shape[:-1], num_groups), dtype=torch.float32, device=x.device)
    if len(rows):
        given = () if group_size is not None else (scale,)
        launch.run(rows, *given, e4m3_storage(out, target), scales)
    return out, scales


@functools.lru_cache(MAX_PLANS)
def _plan(shape: tuple[int, ...], stride: int, group_size: int | None, target: Target) -> Launch:
    num_rows, size = shape
    if group_size is None:
        tile = long_row_tile(size)
        options = {"BLOCK": tile["BLOCK"], **row_options(tile, target)}
        return Launch(quantize_fp8_kernel, (num_rows,), (stride, size), options)
    if group_size > GROUPS_TILE or group_size != triton.next_power_of_2(group_size):
        raise ValueError(f"quantize_fp8: group_size is {group_size}; groups are powers of two up to {GROUPS_TILE}")
    grid = (num_rows, triton.cdiv(size, GROUPS_TILE))
    return Launch(quantize_groups_kernel, grid, (stride, size), _group_options(group_size, target))


def _group_options(group_size: int, target: Target) -> dict[str, Any]:
    tile = {"ROWS": GROUPS_TILE // group_size, "BLOCK": group_size}
    return {"GROUPS": tile["ROWS"], "SIZE": group_size, **row_options(tile, target)}


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of both kernels for a target, over dtypes, and of the first over row sizes."""
    sizes = ("x_stride", "size")
    for dtype in ("fp32", "fp16", "bf16"):
        types = {"x_ptr": f"*{dtype}", "scale_ptr": "*fp32", "out_ptr": f"*{e4m3_type(target)}", "scales_ptr": "*fp32"}
        types |= dict.fromkeys(sizes, "i32")
        without = {name: kind for name, kind in types.items() if name != "scale_ptr"}
        for tile in map(long_row_tile, LISTED_SIZES):
            constants, options = {"BLOCK": tile["BLOCK"]}, row_options(tile, target)
            yield Specialisation(quantize_fp8_kernel, types, constants, options, sizes)
            yield Specialisation(quantize_fp8_kernel, without, {**constants, "scale_ptr": None}, options, sizes)
        options = _group_options(128, target)
        constants = {name: options.pop(name) for name in ("GROUPS", "SIZE")}
        yield Specialisation(quantize_groups_kernel, without, constants, options, sizes)


@triton.jit
def quantize_fp8_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    scale_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    size,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Quantises row `program_id(0)` of x: writes its scale, and its elements divided by the scale as e4m3.

    The scale is the given one, if there is one.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * size
    column = tl.arange(0, BLOCK)
    first = tl.load(x_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    if scale_ptr is None:
        largest = tl.max(tl.abs(first), axis=0)
        for start in range(BLOCK, size, BLOCK):
            x = tl.load(x_ptr + start + column, mask=start + column < size, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(x), axis=0))
        scale = row_scale(largest)
    else:
        scale = tl.load(scale_ptr)
    tl.store(scales_ptr + row, scale)
    tl.store(out_ptr + column, narrow(first / scale, out_ptr.dtype.element_ty), mask=column < size)
    for start in range(BLOCK, size, BLOCK):
        x = tl.load(x_ptr + start + column, mask=start + column < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + start + column, narrow(x / scale, out_ptr.dtype.element_ty), mask=start + column < size)


@triton.jit
def quantize_groups_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    size,
    GROUPS: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
):
    """Quantises GROUPS groups of SIZE columns of one row, each by its own scale."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + row * x_stride + column, mask=column < size, other=0.0).to(tl.float32)
    scale = row_scale(tl.max(tl.abs(x), axis=1))
    num_groups = tl.cdiv(size, SIZE)
    tl.store(scales_ptr + row * num_groups + group, scale, mask=group < num_groups)
    tl.store(out_ptr + row * size + column, narrow(x / scale[:, None], out_ptr.dtype.element_ty), mask=column < size)
