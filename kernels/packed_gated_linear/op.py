"""The first half of a SwiGLU network (Shazeer, 2020, arXiv:2002.05202) over a packed weight: the definition.

    out = silu(x · gateᵀ) * (x · upᵀ)

It is `silu_and_mul` of `packed_linear` in one pass, for the CPU: the products are neither rounded nor stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Draw, Sample, op
from .layout import pack_gated, unpack_gated


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, in_features, size in ((1, 2, 32), (5, 64, 32), (7, 130, 96), (64, 64, 64), (200, 122, 160)):
        x, weight = draw.normal(num_rows, in_features), draw.normal(2 * size, in_features) * in_features**-0.5
        yield Sample(f"{num_rows} x {in_features} to {size}", (x, pack_gated(weight)))
        yield Sample(
            f"{num_rows} x {in_features} to {size}, products alone", (x, pack_gated(weight)), {"activates": False}
        )
    packed = pack_gated(draw.normal(64, 64))
    yield Sample("no rows", (draw.normal(0, 64), packed))
    wider = draw.full(torch.nan, 9, 160)
    wider[:, 32:96] = draw.normal(9, 64)
    yield Sample("columns of a wider matrix", (wider[:, 32:96], packed))


@op(samples=_samples, tolerance={torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.6e-2, 1.6e-2)})
def packed_gated_linear(x: Tensor, packed: Tensor, *, activates: bool = True) -> Tensor:
    """Returns `silu(x @ gate.T) * (x @ up.T)` for the packed weights of gate and up, or the two products alone.

    Args:
        x: `[num_rows, in_features]`, contiguous rows with any stride between them.
        packed: The weights as `pack_gated` returns them, in the dtype of x.
        activates: Whether the products are put together; else they are returned, for a caller that changes them first.

    Returns:
        `[num_rows, size]`, or `[num_rows, 2 * size]` with the gate first, in the dtype of x. It is computed in float32,
        and rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    products = x.to(wide) @ unpack_gated(packed).to(wide).t()
    if not activates:
        return products.to(x.dtype)
    gate, up = products.chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)
