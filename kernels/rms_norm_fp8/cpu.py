"""RMSNorm to 8-bit rows on the CPU: the norm, which may be compiled, and then the quantisation."""

from __future__ import annotations

from torch import Tensor

from ..quantize_fp8 import quantize_fp8
from ..rms_norm import rms_norm
from .op import rms_norm_fp8


@rms_norm_fp8.register("cpu")
def rms_norm_fp8_cpu(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, add_unit_offset: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `rms_norm` and `quantize_fp8` as they are on the CPU, so that the result has the same bits."""
    normed, new_residual = rms_norm(x, weight, eps, residual, add_unit_offset=add_unit_offset)
    return *quantize_fp8(normed), new_residual
