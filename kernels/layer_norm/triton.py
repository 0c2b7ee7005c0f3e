"""LayerNorm on the GPU, in Triton.

    new_residual = x + residual,   out = (new_residual - mean) / sqrt(variance + eps) · weight + bias

Grid: one program per row, or per up to 16 short rows. A program reads its rows once and keeps them in registers for the
mean, the variance and the result. The variance is computed from the centred numbers, so a large mean costs no digits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import LISTED_SIZES, MAX_ROW, as_rows, row_options, row_tile
from .._triton import MAX_PLANS, Launch, Specialisation, Target, current_target
from .op import layer_norm


@layer_norm.register("cuda")
def layer_norm_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Runs `layer_norm` in one kernel.

    Raises:
        ValueError: The rows are longer than 16,384 elements, there is a bias without a weight, or the shapes do not
            match.
    """
    rows = as_rows(x)
    residual_rows = rows if residual is None else as_rows(residual)
    shapes = tuple(None if tensor is None else tensor.shape for tensor in (weight, bias, residual))
    launch = _plan(x.shape, shapes, (rows.stride(0), residual_rows.stride(0)), eps, current_target())
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = x if residual is None else torch.empty_like(out)
    if out.numel():
        factors = (None if tensor is None else tensor.contiguous() for tensor in (weight, bias))
        launch.run(rows, residual_rows, *factors, out, new_residual)
    return out, new_residual


@functools.lru_cache(MAX_PLANS)
def _plan(
    shape: tuple[int, ...],
    shapes: tuple[tuple[int, ...] | None, ...],
    strides: tuple[int, int],
    eps: float,
    target: Target,
) -> Launch:
    """Plans a call; `shapes` are those of weight, bias and residual, and `strides` those between rows."""
    size, (*factors, residual) = shape[-1], shapes
    if size > MAX_ROW:
        raise ValueError(f"layer_norm: rows of {size} elements; the kernel takes at most {MAX_ROW}")
    if factors[0] is None and factors[1] is not None:
        raise ValueError("layer_norm: a bias without a weight; give both, the weight alone, or neither")
    if any(given not in (None, (size,)) for given in factors):
        found = [given if given is None else list(given) for given in factors]
        raise ValueError(f"layer_norm: x is {list(shape)}, so weight and bias must be [{size}]; got {found}")
    if residual not in (None, shape):
        raise ValueError(f"layer_norm: residual is {residual and list(residual)}; it must be like x, {list(shape)}")
    tile, num_rows = row_tile(size), math.prod(shape[:-1])
    options = {"HAS_RESIDUAL": residual is not None, **tile, **row_options(tile, target)}
    grid = (triton.cdiv(num_rows, tile["ROWS"]),)
    return Launch(layer_norm_kernel, grid, (*strides, num_rows, size, eps), options)


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for a target: from rows of one element to the longest."""
    sizes = ("x_stride", "residual_stride", "size")
    for dtype in ("fp32", "fp16", "bf16"):
        for absent in ((), ("bias_ptr",), ("weight_ptr", "bias_ptr")):
            tensors = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "out_ptr", "new_residual_ptr")
            types = {name: f"*{dtype}" for name in tensors if name not in absent}
            types |= dict.fromkeys(sizes, "i32") | {"num_rows": "i32", "eps": "fp32"}
            for tile in map(row_tile, LISTED_SIZES):
                for has_residual in (False, True):
                    constants = dict.fromkeys(absent) | {"HAS_RESIDUAL": has_residual, **tile}
                    yield Specialisation(layer_norm_kernel, types, constants, row_options(tile, target), sizes)


@triton.jit(do_not_specialize=["num_rows"])  # it changes with every batch
def layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    new_residual_ptr,
    x_stride,
    residual_stride,
    num_rows,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Normalises ROWS rows. The outputs are contiguous; the inputs have a stride between rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < size)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        tl.store(new_residual_ptr + row * size + column, x, mask=inside)
    wide = x.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, axis=1, keep_dims=True) / size, 0.0)
    out = centred * tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / size + eps)
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + column, out.to(out_ptr.dtype.element_ty), mask=inside)
