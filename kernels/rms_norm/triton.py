"""RMSNorm on the GPU, in Triton.

    new_residual = x + residual,   out = new_residual / sqrt(mean(new_residual²) + eps) · weight

Grid: one program per row. A program reads its row once, keeps it in registers, and writes both results, so the kernel
moves the least memory that the formula allows. It fits rows of up to 16,384 elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .op import rms_norm

MAX_HIDDEN_SIZE = 16_384
_ELEMENTS_PER_THREAD = 16
_THREADS_PER_WARP = 32


@rms_norm.register("cuda")
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Runs `rms_norm` in one kernel.

    Raises:
        ValueError: The rows are longer than 16,384 elements, or the shapes do not belong together.
    """
    hidden_size = x.shape[-1]
    if hidden_size > MAX_HIDDEN_SIZE:
        raise ValueError(f"rms_norm: rows of {hidden_size} elements; the kernel takes at most {MAX_HIDDEN_SIZE}")
    if weight.shape != (hidden_size,) or (residual is not None and residual.shape != x.shape):
        raise ValueError(
            f"rms_norm: x is {list(x.shape)}, so weight must be [{hidden_size}] and residual, if any, like x; "
            f"got {list(weight.shape)} and {residual if residual is None else list(residual.shape)}"
        )
    rows = _as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_rows = rows if residual is None else _as_rows(residual)
    block = triton.next_power_of_2(hidden_size)
    if len(rows):
        rms_norm_kernel[(len(rows),)](
            rows,
            residual_rows,
            weight.contiguous(),
            out,
            new_residual,
            rows.stride(0),
            residual_rows.stride(0),
            hidden_size,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            **launch_options(block),
        )
    return out, new_residual


def launch_options(block: int) -> dict[str, Any]:
    """Returns how to compile and launch for rows of `block` elements: 16 elements a thread, 1 to 32 warps."""
    num_warps = min(32, max(1, block // (_ELEMENTS_PER_THREAD * _THREADS_PER_WARP)))
    return {"num_warps": num_warps, "enable_fp_fusion": True}


@triton.jit
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    new_residual_ptr,
    x_stride,
    residual_stride,
    hidden_size,
    eps,
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Normalises row `program_id(0)`. The outputs are contiguous; the inputs have a stride between rows."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden_size
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        tl.store(new_residual_ptr + row * hidden_size + columns, x, mask=inside)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden_size + eps)
    tl.store(out_ptr + row * hidden_size + columns, (wide * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def _as_rows(x: Tensor) -> Tensor:
    """Returns x as `[num_rows, hidden_size]` with contiguous rows: a view where its strides allow one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
