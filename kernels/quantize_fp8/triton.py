"""Quantisation of rows to 8 bits on the GPU, in Triton.

    scale = max|row| / 448  (1 for a row of zeros),   q = round_e4m3(row / scale)

Grid: one program per row. A program keeps the first 16,384 numbers of its row in registers, which is the whole row as a
rule. It reads the rest of a longer row twice, the second time from the L2 cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._fp8 import e4m3_storage, e4m3_type, narrow, row_scale
from .._rows import LISTED_SIZES, as_rows, long_row_tile, row_options
from .._triton import MAX_PLANS, Launch, Specialisation, Target, current_target
from .op import quantize_fp8


@quantize_fp8.register("cuda")
def quantize_fp8_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """Runs `quantize_fp8` in one kernel."""
    target, rows = current_target(), as_rows(x)
    launch = _plan(rows.shape, rows.stride(0), target)
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if len(rows):
        launch.run(rows, e4m3_storage(out, target), scale)
    return out, scale


@functools.lru_cache(MAX_PLANS)
def _plan(shape: tuple[int, ...], stride: int, target: Target) -> Launch:
    num_rows, size = shape
    tile = long_row_tile(size)
    options = {"BLOCK": tile["BLOCK"], **row_options(tile, target)}
    return Launch(quantize_fp8_kernel, (num_rows,), (stride, size), options)


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for a target, over dtypes and row sizes."""
    for dtype in ("fp32", "fp16", "bf16"):
        for tile in map(long_row_tile, LISTED_SIZES):
            types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{e4m3_type(target)}", "scale_ptr": "*fp32"}
            types |= {"x_stride": "i32", "size": "i32"}
            constants = {"BLOCK": tile["BLOCK"]}
            yield Specialisation(quantize_fp8_kernel, types, constants, row_options(tile, target), ("x_stride", "size"))


@triton.jit
def quantize_fp8_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    scale_ptr,
    x_stride,
    size,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Quantises row `program_id(0)` of x: writes its scale, and its elements divided by the scale as e4m3."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * size
    column = tl.arange(0, BLOCK)
    first = tl.load(x_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(first), axis=0)
    for start in range(BLOCK, size, BLOCK):
        x = tl.load(x_ptr + start + column, mask=start + column < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=0))
    scale = row_scale(largest)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + column, narrow(first / scale, out_ptr.dtype.element_ty), mask=column < size)
    for start in range(BLOCK, size, BLOCK):
        x = tl.load(x_ptr + start + column, mask=start + column < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + start + column, narrow(x / scale, out_ptr.dtype.element_ty), mask=start + column < size)
