"""Quantisation of rows to 8-bit integers on the GPU, in Triton.

    dynamic:  scale = max|row| / 127,   q = round(row / scale)
    static:   q = clamp(round(x / scale + zero_point), -128, 127)

Grid: one program per row. A program keeps the first 16,384 numbers of its row in registers, which is the whole row as a
rule. It reads the rest of a longer row twice, the second time from the L2 cache; with a given scale, once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import LISTED_SIZES, as_rows, long_row_tile, row_options
from .._triton import MAX_PLANS, Launch, Specialisation, Target, current_target
from .op import INT8_MAX, SMALLEST, quantize_int8

_MAX = tl.constexpr(float(INT8_MAX))
_INVERSE = tl.constexpr(1 / INT8_MAX)
_SMALLEST = tl.constexpr(SMALLEST)


@quantize_int8.register("cuda")
def quantize_int8_triton(
    x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Runs `quantize_int8` in one kernel."""
    rows = as_rows(x)
    launch = _plan(rows.shape, rows.stride(0), current_target())
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if len(rows):
        launch.run(rows, scale, zero_point, out, scales)
    return out, scales


@functools.lru_cache(MAX_PLANS)
def _plan(shape: tuple[int, ...], stride: int, target: Target) -> Launch:
    num_rows, size = shape
    return Launch(quantize_int8_kernel, (num_rows,), (stride, size), _options(size, target))


def _options(size: int, target: Target) -> dict[str, Any]:
    # A product and a sum that are fused are rounded once. The definition rounds both.
    tile = long_row_tile(size)
    return {"BLOCK": tile["BLOCK"], **row_options(tile, target), "enable_fp_fusion": False}


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for a target, over dtypes, row sizes, and what is given."""
    for dtype in ("fp32", "fp16", "bf16"):
        for size in LISTED_SIZES:
            options = _options(size, target)
            for absent in (("scale_ptr", "zero_ptr"), ("zero_ptr",), ()):
                types = {"x_ptr": f"*{dtype}", "scale_ptr": "*fp32", "zero_ptr": "*i32", "out_ptr": "*i8"}
                types |= {"scales_ptr": "*fp32", "x_stride": "i32", "size": "i32"}
                constants: dict[str, Any] = {"BLOCK": options["BLOCK"], **dict.fromkeys(absent)}
                present = {name: kind for name, kind in types.items() if name not in absent}
                compiled = {name: value for name, value in options.items() if name != "BLOCK"}
                yield Specialisation(quantize_int8_kernel, present, constants, compiled, ("x_stride", "size"))


@triton.jit
def quantize_int8_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    size,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Quantises row `program_id(0)` of x: writes its scale, which may be the given one, and its integers."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * size
    column = tl.arange(0, BLOCK)
    first = tl.load(x_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    if scale_ptr is None:
        largest = _largest(first)
        for start in range(BLOCK, size, BLOCK):
            x = tl.load(x_ptr + start + column, mask=start + column < size, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, _largest(x))
        largest = largest.to(tl.float32, bitcast=True)
        scale = tl.where(largest > _SMALLEST, tl.div_rn(_MAX, largest), 0.0)
        tl.store(scales_ptr + row, largest * _INVERSE)
    else:
        scale = tl.load(scale_ptr)
        tl.store(scales_ptr + row, scale)
    zero = 0.0 if zero_ptr is None else tl.load(zero_ptr).to(tl.float32)
    for start in range(0, size, BLOCK):
        x = first
        if start > 0:
            x = tl.load(x_ptr + start + column, mask=start + column < size, other=0.0).to(tl.float32)
        scaled = x * scale if scale_ptr is None else tl.div_rn(x, scale) + zero
        tl.store(out_ptr + start + column, _to_int8(scaled), mask=start + column < size)


@triton.jit
def _largest(x):  # type: ignore[no-untyped-def]
    """Returns the bits of max|x|. Bits of floats without a sign are in the order of the floats, and NaN comes last."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=0)


@triton.jit
def _to_int8(x):  # type: ignore[no-untyped-def]
    """Rounds float32 to int8 after clamping, ties to even; NaN becomes 0.

    Integers are the spacing of float32 at 1.5 * 2^23, so that adding this number rounds to them.
    """
    clamped = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -128.0), 127.0)
    return ((clamped + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
