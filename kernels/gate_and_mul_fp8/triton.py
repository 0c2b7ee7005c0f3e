"""The gate to 8-bit rows on the GPU, in Triton.

    gated = activation(gate) · up,   scale = max|gated| / 448,   q = round_e4m3(gated / scale)

Grid: one program per row, which must know the largest number of its row. A program keeps the first 16,384 gated numbers
in registers (8,192 of the exact GELU), which is the whole row in most models. It gates the rest of a longer row twice,
reading it from the L2 cache the second time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._fp8 import e4m3_storage, e4m3_type, narrow, row_scale
from .._gated import gated
from .._rows import LISTED_SIZES, MAX_ROW, as_rows, long_row_tile, row_options
from .._triton import MAX_PLANS, Launch, Specialisation, Target, current_target
from .op import gate_and_mul_fp8

_HELD = MappingProxyType({"silu": MAX_ROW, "gelu": MAX_ROW // 2, "gelu_tanh": MAX_ROW})
"""Most numbers that a program keeps, for each activation. The error function of the exact GELU needs more registers."""


@gate_and_mul_fp8.register("cuda")
def gate_and_mul_fp8_triton(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Runs `gate_and_mul_fp8` in one kernel.

    Raises:
        ValueError: The number of columns is odd, or the activation is unknown.
    """
    target, rows = current_target(), as_rows(x)
    launch = _plan(rows.shape, rows.stride(0), activation, target)
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if len(rows):
        launch.run(rows, e4m3_storage(out, target), scale)
    return out, scale


@functools.lru_cache(MAX_PLANS)
def _plan(shape: tuple[int, ...], stride: int, activation: str, target: Target) -> Launch:
    num_rows, num_columns = shape
    if num_columns % 2:
        raise ValueError(f"gate_and_mul_fp8: rows of {num_columns} elements; they must be even")
    if activation not in _HELD:
        raise ValueError(f"gate_and_mul_fp8: activation is {activation!r}; use one of {list(_HELD)}")
    size = num_columns // 2
    tile = long_row_tile(size, _HELD[activation])
    options = {"ACTIVATION": activation, "BLOCK": tile["BLOCK"], **row_options(tile, target)}
    return Launch(gate_and_quantize_kernel, (num_rows,), (stride, size), options)


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for a target, over dtypes, activations and row sizes."""
    for dtype in ("fp32", "fp16", "bf16"):
        types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{e4m3_type(target)}", "scale_ptr": "*fp32"}
        types |= {"x_stride": "i32", "size": "i32"}
        for activation, most in _HELD.items():
            for tile in [long_row_tile(size) for size in LISTED_SIZES if size <= most]:
                constants = {"ACTIVATION": activation, "BLOCK": tile["BLOCK"]}
                options = row_options(tile, target)
                yield Specialisation(gate_and_quantize_kernel, types, constants, options, ("x_stride", "size"))


@triton.jit
def gate_and_quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    scale_ptr,
    x_stride,
    size,
    ACTIVATION: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Gates row `program_id(0)` of x, and writes its scale and the gated numbers divided by the scale as e4m3."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * size
    column = tl.arange(0, BLOCK)
    first = gated(x_ptr, column, size, ACTIVATION)
    largest = tl.max(tl.abs(first.to(tl.float32)), axis=0)
    for start in range(BLOCK, size, BLOCK):
        rest = gated(x_ptr, start + column, size, ACTIVATION).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(rest), axis=0))
    scale = row_scale(largest)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + column, narrow(first.to(tl.float32) / scale, out_ptr.dtype.element_ty), mask=column < size)
    for start in range(BLOCK, size, BLOCK):
        rest = gated(x_ptr, start + column, size, ACTIVATION).to(tl.float32)
        tl.store(out_ptr + start + column, narrow(rest / scale, out_ptr.dtype.element_ty), mask=start + column < size)
