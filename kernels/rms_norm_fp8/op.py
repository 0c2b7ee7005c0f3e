"""RMSNorm whose rows are quantised to 8-bit floats: the definition.

    new_residual = x + residual,   normed = rms_norm(new_residual) · weight      (both rounded to the dtype of x)
    scale        = max|normed| / 448  (1 for a row of zeros),   q = round_e4m3(normed / scale)

It is `rms_norm` and then `quantize_fp8`, to the bit. As one kernel it saves a launch, and the normed rows are neither
written nor read again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op
from ..quantize_fp8 import quantize_fp8
from ..rms_norm import rms_norm


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_tokens, hidden_size in ((1, 1), (1, 63), (63, 64), (5, 1000), (2, 4096)):
        x, weight = draw.normal(num_tokens, hidden_size), draw.normal(hidden_size)
        yield Sample(f"{num_tokens}x{hidden_size}", (x, weight, 1e-6))
        yield Sample(f"{num_tokens}x{hidden_size} residual", (x, weight, 1e-5, draw.normal(num_tokens, hidden_size)))
    yield Sample("no tokens", (draw.normal(0, 64), draw.normal(64), 1e-6))
    yield Sample("zeros", (draw.full(0.0, 3, 64), draw.normal(64), 1e-6))
    yield Sample("every other row", (draw.normal(14, 48)[::2], draw.normal(48), 1e-6, draw.normal(7, 48)))
    yield Sample("one large weight", (draw.normal(5, 63), 10.0 ** draw.normal(63), 1e-6))
    small = draw.normal(63) / 64  # 1 + weight has more digits than a 16-bit float
    yield Sample("offset", (draw.normal(5, 63), small, 1e-6), {"add_unit_offset": True})
    yield Sample("offset residual", (draw.normal(5, 63), small, 1e-6, draw.normal(5, 63)), {"add_unit_offset": True})


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
)
def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, add_unit_offset: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises rows by their root mean square, after adding the residual, and rounds each row to 8 bits.

    Args:
        x: `[num_rows, hidden_size]`, contiguous rows with any stride between them.
        weight: `[hidden_size]`, the dtype of x.
        eps: Added to the mean square.
        residual: The shape and dtype of x, or None.
        add_unit_offset: Whether rows are multiplied by `1 + weight` in place of `weight`.

    Returns:
        The normalised rows as `[num_rows, hidden_size]` float8_e4m3fn, the scale of each, `[num_rows, 1]` float32, and
        `x + residual` in the dtype of x (x itself where there is no residual).
    """
    normed, new_residual = rms_norm.plain(x, weight, eps, residual, add_unit_offset=add_unit_offset)
    return *quantize_fp8.plain(normed), new_residual
