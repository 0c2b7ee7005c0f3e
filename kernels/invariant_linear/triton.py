"""The invariant linear layer on the GPU, in Triton.

    out = x · weightᵀ + bias

Grid: one program per tile of the result. A program sums over the inputs in order, in steps of a fixed width and in
float32. There is one configuration per dtype and GPU, and the inputs are not split, so an element of the result is
always the same sum in the same order. Only the number of programs depends on the number of rows.

Programs are numbered column by column within bands of `GROUP` row tiles. Programs that run at the same time then share
rows of both matrices, which stay in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import TORCH_TO_TRITON, Specialisation, Target, current_target, launch
from .op import invariant_linear

GROUP = 8


@invariant_linear.register("cuda")
def invariant_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Runs `invariant_linear` in one kernel.

    Raises:
        ValueError: The shapes do not match, or a matrix is not contiguous along the inputs.
    """
    num_rows, in_features = x.shape
    out_features = len(weight)
    if weight.shape[1] != in_features or (bias is not None and bias.shape != (out_features,)):
        raise ValueError(
            f"invariant_linear: x is {list(x.shape)}, so weight must be [out_features, {in_features}] and bias, if "
            f"any, [out_features]; got {list(weight.shape)} and {None if bias is None else list(bias.shape)}"
        )
    if x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError("invariant_linear: the rows of x and the weight must be contiguous; call .contiguous() before")
    out = torch.empty(num_rows, out_features, dtype=dtype or x.dtype, device=x.device)
    tile, options = configuration(TORCH_TO_TRITON[x.dtype], current_target())
    num_programs = triton.cdiv(num_rows, tile["ROWS"]) * triton.cdiv(out_features, tile["COLUMNS"])
    if num_programs:
        launch(
            linear_kernel,
            (num_programs,),
            x,
            weight,
            bias,
            out,
            num_rows,
            in_features,
            out_features,
            x.stride(0),
            GROUP=GROUP,
            **tile,
            **options,
        )
    return out


def configuration(dtype: str, target: Target) -> tuple[dict[str, int], dict[str, Any]]:
    """Returns the tile (`ROWS` x `COLUMNS`, `DEPTH` inputs per step) and the options to compile and launch it.

    128 x 128 is the smallest square with which the bandwidth of L2 keeps the tensor cores busy. float32 uses no tensor
    cores, and its tile is limited by registers. With three stages two programs fit a multiprocessor of an sm_90. The
    LDS of a gfx942 fits two stages.
    """
    if dtype == "fp32":
        return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32}, {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
    num_stages = 3 if target.warp_size == 32 else 2
    options = {"num_warps": 8, "num_stages": num_stages, "enable_fp_fusion": True}
    return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64}, options


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel: each dtype, with a result in it or in float32, with a bias or none."""
    for dtype, out in (("fp32", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")):
        for has_bias in (False, True):
            tile, options = configuration(dtype, target)
            types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}") | {"out_ptr": f"*{out}"}
            types |= dict.fromkeys(("num_rows", "in_features", "out_features", "x_stride"), "i32")
            constants: dict[str, Any] = {**tile, "GROUP": GROUP}
            if not has_bias:
                constants["bias_ptr"] = None
                del types["bias_ptr"]
            sizes = ("in_features", "out_features", "x_stride")
            yield Specialisation(linear_kernel, types, constants, options, sizes)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    in_features,
    out_features,
    x_stride,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
):
    """Computes one tile of the result. Indices outside a matrix read 0. The weight and the result are contiguous."""
    program, num_row_tiles = tl.program_id(0), tl.cdiv(num_rows, ROWS)
    per_band = GROUP * tl.cdiv(out_features, COLUMNS)
    first_row_tile = program // per_band * GROUP
    height = min(num_row_tiles - first_row_tile, GROUP)
    row = (first_row_tile + program % per_band % height) * ROWS + tl.arange(0, ROWS)
    column = program % per_band // height * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    has_row, has_column = row[:, None] < num_rows, column[None, :] < out_features
    x_ptrs = x_ptr + row[:, None].to(tl.int64) * x_stride + inner[None, :]
    weight_ptrs = weight_ptr + column[None, :].to(tl.int64) * in_features + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, in_features, DEPTH):
        left = in_features - start
        x = tl.load(x_ptrs + start, mask=has_row & (inner[None, :] < left), other=0.0)
        weight = tl.load(weight_ptrs + start, mask=has_column & (inner[:, None] < left), other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < out_features, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + row[:, None].to(tl.int64) * out_features + column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=has_row & has_column)
