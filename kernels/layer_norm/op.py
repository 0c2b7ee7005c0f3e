"""LayerNorm: the definition.

    new_residual = x + residual                                                  (rounded to the dtype of x)
    out          = (new_residual - mean) / sqrt(variance + eps) · weight + bias

Ba, Kiros and Hinton, "Layer Normalization", 2016. The body is torch's own operator, which computes the statistics in
float32 and is fast on every device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_tokens, hidden_size in ((1, 2), (1, 63), (63, 64), (123, 1000)):
        x, weight, bias = draw.normal(num_tokens, hidden_size), draw.normal(hidden_size), draw.normal(hidden_size)
        yield Sample(f"{num_tokens}x{hidden_size}", (x, weight, bias, 1e-5))
        yield Sample(f"{num_tokens}x{hidden_size} residual", (x, weight, bias, 1e-5, draw.normal(*x.shape)))
        yield Sample(f"{num_tokens}x{hidden_size} no bias", (x, weight, None, 1e-5))
        yield Sample(f"{num_tokens}x{hidden_size} not affine", (x, None, None, 1e-5))
    yield Sample("no tokens", (draw.normal(0, 64), draw.normal(64), draw.normal(64), 1e-5))
    yield Sample("every other row", (draw.normal(14, 48)[::2], draw.normal(48), draw.normal(48), 1e-5))


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)},
)
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalises rows to mean 0 and variance 1, after adding the residual.

    Args:
        x: `[..., hidden_size]`.
        weight: `[hidden_size]`, the dtype of x, or None for 1.
        bias: `[hidden_size]`, the dtype of x, or None for 0.
        eps: Added to the variance.
        residual: The shape and dtype of x, or None.

    Returns:
        The normalised rows, and `x + residual` (x itself where there is no residual), both in the dtype of x.
    """
    new_residual = x if residual is None else x + residual
    return F.layer_norm(new_residual, x.shape[-1:], weight, bias, eps), new_residual
