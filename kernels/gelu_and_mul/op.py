"""The gate of a GeGLU feed-forward layer: the definition.

    out = gelu(gate) · up,   x = cat(gate, up)

    gelu(a) = a/2 · (1 + erf(a / sqrt(2))),   or about  a/2 · (1 + tanh(sqrt(2 / pi) · (a + 0.044715 a³)))

Shazeer, "GLU Variants Improve Transformer", 2020. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    for approximate in ("none", "tanh"):
        for num_tokens, size in ((1, 1), (1, 63), (63, 128), (5, 1500)):
            yield Sample(f"{num_tokens}x{size} {approximate}", (draw.normal(num_tokens, 2 * size), approximate))
        yield Sample(f"no tokens {approximate}", (draw.normal(0, 64), approximate))
        large_gate = torch.cat((draw.normal(3, 32) * 100, draw.normal(3, 32)), dim=-1)
        yield Sample(f"large gate {approximate}", (large_gate, approximate))
    yield Sample("every other row", (draw.normal(14, 48)[::2], "tanh"))


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-6), torch.float16: (4e-3, 1e-3), torch.bfloat16: (3e-2, 8e-3)},
)
def gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    """Multiplies the second half of each row by the GELU of the first.

    Args:
        x: `[num_tokens, 2 * intermediate_size]`: in each row the gate, then the projection that it is multiplied by.
        approximate: "none" for the exact GELU, "tanh" for its approximation: the one that the checkpoint was trained
            with.

    Returns:
        `[num_tokens, intermediate_size]`, in the dtype of x.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up
