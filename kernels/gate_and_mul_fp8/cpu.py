"""The gate to 8-bit rows on the CPU: the gate, which may be compiled, and then the quantisation."""

from __future__ import annotations

from torch import Tensor

from ..gelu_and_mul import gelu_and_mul
from ..quantize_fp8 import quantize_fp8
from ..silu_and_mul import silu_and_mul
from .op import APPROXIMATIONS, gate_and_mul_fp8


@gate_and_mul_fp8.register("cpu")
def gate_and_mul_fp8_cpu(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Runs the gate and `quantize_fp8` as they are on the CPU, so that the result has the same bits."""
    gated = silu_and_mul(x) if activation == "silu" else gelu_and_mul(x, APPROXIMATIONS[activation])
    return quantize_fp8(gated)
