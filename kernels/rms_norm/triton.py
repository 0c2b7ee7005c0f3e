"""RMSNorm on the GPU, in Triton.

    new_residual = x + residual,   out = new_residual / sqrt(mean(new_residual²) + eps) · weight

Grid: one program per row, or per up to 16 short rows (heads, say). A program reads its rows once, keeps them in
registers, and writes both results, so the kernel moves no more memory than the formula needs. `rms_norm_fp8` launches
the same kernel, which then writes 8-bit rows and their scales.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._fp8 import narrow, row_scale
from .._rows import LISTED_SIZES, MAX_ROW, as_rows, row_options, row_tile
from .._triton import MAX_PLANS, Launch, Specialisation, Target, current_target
from .op import rms_norm


@rms_norm.register("cuda")
def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, add_unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Runs `rms_norm` in one kernel.

    Raises:
        ValueError: The rows are longer than 16,384 elements, or the shapes do not match.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, launch_norm(x, weight, eps, residual, add_unit_offset, current_target(), out, None)


def launch_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    add_unit_offset: bool,
    target: Target,
    out: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Fills `out` with the normed rows, or with 8-bit rows and `scale` with their scales, and returns the new residual.

    Raises:
        ValueError: The rows are longer than 16,384 elements, or the shapes do not match.
    """
    rows = as_rows(x)
    residual_rows = rows if residual is None else as_rows(residual)
    shapes = x.shape, weight.shape, None if residual is None else residual.shape
    launch = _plan(*shapes, rows.stride(0), residual_rows.stride(0), eps, add_unit_offset, target)
    new_residual = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        launch.run(rows, residual_rows, weight.contiguous(), out, scale, new_residual)
    return new_residual


@functools.lru_cache(MAX_PLANS)
def _plan(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    residual_shape: tuple[int, ...] | None,
    stride: int,
    residual_stride: int,
    eps: float,
    add_unit_offset: bool,
    target: Target,
) -> Launch:
    size = shape[-1]
    if size > MAX_ROW:
        raise ValueError(f"rms_norm: rows of {size} elements; the kernel takes at most {MAX_ROW}")
    if weight_shape != (size,) or residual_shape not in (None, shape):
        raise ValueError(
            f"rms_norm: x is {list(shape)}, so weight must be [{size}] and residual, if any, like x; "
            f"got {list(weight_shape)} and {residual_shape and list(residual_shape)}"
        )
    tile, num_rows = row_tile(size), math.prod(shape[:-1])
    options = {"HAS_RESIDUAL": residual_shape is not None, "ADD_UNIT_OFFSET": add_unit_offset}
    return Launch(
        rms_norm_kernel,
        (triton.cdiv(num_rows, tile["ROWS"]),),
        (stride, residual_stride, num_rows, size, eps),
        {**options, **tile, **row_options(tile, target)},
    )


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for a target: from rows of one element to the longest."""
    for dtype in ("fp32", "fp16", "bf16"):
        yield from norm_specialisations(target, dtype, {"out_ptr": f"*{dtype}"}, {"scale_ptr": None})


def norm_specialisations(
    target: Target, dtype: str, out_types: dict[str, str], absent: dict[str, None]
) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for rows of a dtype, with the types of its results."""
    tensors = ("x_ptr", "residual_ptr", "weight_ptr", "new_residual_ptr")
    sizes = ("x_stride", "residual_stride", "size")
    types = dict.fromkeys(tensors, f"*{dtype}") | out_types | dict.fromkeys(sizes, "i32")
    types |= {"num_rows": "i32", "eps": "fp32"}
    for tile in map(row_tile, LISTED_SIZES):
        for has_residual, add_unit_offset in product((False, True), repeat=2):
            constants = {**absent, "HAS_RESIDUAL": has_residual, "ADD_UNIT_OFFSET": add_unit_offset, **tile}
            yield Specialisation(rms_norm_kernel, types, constants, row_options(tile, target), sizes)


@triton.jit(do_not_specialize=["num_rows"])  # it changes with every batch
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    new_residual_ptr,
    x_stride,
    residual_stride,
    num_rows,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803
    ADD_UNIT_OFFSET: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Normalises ROWS rows. The outputs are contiguous; the inputs have a stride between rows.

    With `scale_ptr` the normed rows, rounded to the dtype of x, are then quantised as `quantize_fp8` does it.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < size)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        tl.store(new_residual_ptr + row * size + column, x, mask=inside)
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    if ADD_UNIT_OFFSET:
        weight += 1.0
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / size + eps)
    out = (wide * scale * weight).to(x_ptr.dtype.element_ty)
    if scale_ptr is not None:
        wide = out.to(tl.float32)
        largest = tl.max(tl.abs(wide), axis=1, keep_dims=True)
        tl.store(scale_ptr + row, row_scale(largest), mask=row < num_rows)
        out = narrow(wide / row_scale(largest), out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + column, out, mask=inside)
