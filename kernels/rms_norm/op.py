"""RMSNorm: the definition.

    new_residual = x + residual                                  (rounded to the dtype of x)
    out          = new_residual / sqrt(mean(new_residual²) + eps) · weight

Some families (Gemma) store `weight - 1`; with `add_unit_offset` the factor is `1 + weight`, added in float32.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_tokens, hidden_size in ((1, 1), (1, 63), (63, 64), (123, 1000), (2, 4096)):
        x, weight = draw.normal(num_tokens, hidden_size), draw.normal(hidden_size)
        yield Sample(f"{num_tokens}x{hidden_size}", (x, weight, 1e-6))
        yield Sample(f"{num_tokens}x{hidden_size} residual", (x, weight, 1e-5, draw.normal(num_tokens, hidden_size)))
    yield Sample("no tokens", (draw.normal(0, 64), draw.normal(64), 1e-6))
    yield Sample("zeros", (draw.full(0.0, 3, 64), draw.normal(64), 1e-6))
    yield Sample("heads", (draw.normal(7, 3, 32), draw.normal(32), 1e-6))
    yield Sample("slice of a fused qkv", (draw.normal(7, 5, 32)[:, 1:4], draw.normal(32), 1e-6))
    yield Sample("every other row", (draw.normal(14, 48)[::2], draw.normal(48), 1e-6, draw.normal(7, 48)))
    small = draw.normal(63) / 64  # 1 + weight has more digits than a 16-bit float
    yield Sample("offset", (draw.normal(5, 63), small, 1e-6), {"add_unit_offset": True})
    yield Sample("offset residual", (draw.normal(5, 63), small, 1e-6, draw.normal(5, 63)), {"add_unit_offset": True})


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
)
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, add_unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Normalises rows by their root mean square, after adding the residual.

    Args:
        x: `[..., hidden_size]`, any strides over the leading dimensions, contiguous rows.
        weight: `[hidden_size]`, the dtype of x.
        eps: Added to the mean square.
        residual: The shape and dtype of x, or None.
        add_unit_offset: Whether rows are multiplied by `1 + weight` in place of `weight`.

    Returns:
        The normalised rows, and `x + residual` (x itself where there is no residual), both in the dtype of x.
        All arithmetic after the addition is in float32, and is rounded once.
    """
    new_residual = x if residual is None else x + residual
    wide = new_residual.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    factor = weight.to(wide.dtype) + 1 if add_unit_offset else weight
    return (wide * scale * factor).to(x.dtype), new_residual
