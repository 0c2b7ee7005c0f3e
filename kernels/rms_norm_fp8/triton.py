"""RMSNorm to 8-bit rows on the GPU: the kernel is that of `rms_norm`, which also quantises."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._fp8 import e4m3_storage, e4m3_type
from .._triton import Specialisation, Target, current_target
from ..rms_norm.triton import launch_norm, norm_specialisations
from .op import rms_norm_fp8


@rms_norm_fp8.register("cuda")
def rms_norm_fp8_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, add_unit_offset: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `rms_norm_fp8` in one kernel.

    Raises:
        ValueError: The rows are longer than 16,384 elements, or the shapes do not match.
    """
    target = current_target()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    stored = e4m3_storage(out, target)
    return out, scale, launch_norm(x, weight, eps, residual, add_unit_offset, target, stored, scale)


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of `rms_norm_kernel` that write 8-bit rows."""
    results = {"out_ptr": f"*{e4m3_type(target)}", "scale_ptr": "*fp32"}
    for dtype in ("fp32", "fp16", "bf16"):
        yield from norm_specialisations(target, dtype, results, {})
