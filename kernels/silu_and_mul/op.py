"""The gate of a SwiGLU feed-forward layer: the definition.

    out = silu(gate) · up,   silu(a) = a / (1 + exp(-a)),   x = cat(gate, up)

Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_tokens, size in ((1, 1), (1, 63), (63, 128), (123, 500)):
        yield Sample(f"{num_tokens}x{size}", (draw.normal(num_tokens, 2 * size),))
    yield Sample("no tokens", (draw.normal(0, 64),))
    yield Sample("large values", (draw.normal(3, 64) * 100,))


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-6), torch.float16: (4e-3, 1e-3), torch.bfloat16: (3e-2, 8e-3)},
)
def silu_and_mul(x: Tensor) -> Tensor:
    """Multiplies the second half of each row by the SiLU of the first.

    Args:
        x: `[num_tokens, 2 * intermediate_size]`: in each row the gate, then the projection that it is multiplied by.

    Returns:
        `[num_tokens, intermediate_size]`, in the dtype of x.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
