"""The gate of a feed-forward layer, whose rows are quantised to 8-bit floats: the definition.

    gated = activation(gate) · up   (rounded to the dtype of x),   x = cat(gate, up)
    scale = max|gated| / 448        (1 for a row of zeros),        q = round_e4m3(gated / scale)

It is `silu_and_mul` or `gelu_and_mul` and then `quantize_fp8`, to the bit. As one kernel it saves a launch, and the
gated rows are neither written nor read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .._op import Draw, Sample, op
from ..gelu_and_mul import gelu_and_mul
from ..quantize_fp8 import quantize_fp8
from ..silu_and_mul import silu_and_mul

APPROXIMATIONS: Mapping[str, str] = MappingProxyType({"gelu": "none", "gelu_tanh": "tanh"})
"""The argument `approximate` of `gelu_and_mul` for each activation that is a GELU."""


def _samples(draw: Draw) -> Iterator[Sample]:
    for activation in ("silu", *APPROXIMATIONS):
        for num_tokens, size in ((1, 1), (1, 63), (7, 128), (3, 1500)):
            yield Sample(f"{num_tokens}x{size} {activation}", (draw.normal(num_tokens, 2 * size), activation))
        yield Sample(f"no tokens {activation}", (draw.normal(0, 64), activation))
        large_gate = torch.cat((draw.normal(3, 32) * 100, draw.normal(3, 32)), dim=-1)
        yield Sample(f"large gate {activation}", (large_gate, activation))
    for activation in ("silu", "gelu"):
        yield Sample(f"longer than the registers {activation}", (draw.normal(1, 40_000), activation))
    yield Sample("zeros", (draw.full(0.0, 3, 64), "silu"))
    yield Sample("every other row", (draw.normal(14, 48)[::2], "gelu_tanh"))


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-6), torch.float16: (4e-3, 1e-3), torch.bfloat16: (3e-2, 8e-3)},
)
def gate_and_mul_fp8(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Multiplies the second half of each row by the activation of the first, and rounds the products to 8 bits.

    Args:
        x: `[num_tokens, 2 * intermediate_size]`: in each row the gate, then the projection that it is multiplied by.
        activation: "silu", "gelu", or "gelu_tanh" for the approximation of GELU.

    Returns:
        `[num_tokens, intermediate_size]` float8_e4m3fn, and the scale of each row, `[num_tokens, 1]` float32.
    """
    is_silu = activation == "silu"
    gated = silu_and_mul.plain(x) if is_silu else gelu_and_mul.plain(x, APPROXIMATIONS[activation])
    return quantize_fp8.plain(gated)
