"""A linear layer of 8-bit integers: the definition.

    out[t, o] = (Σ_i q[t, i] · weight[o, i]) · x_scale[t] · weight_scale[o] + bias[o]
    x_scale[t] = max_i |x[t, i]| / 127,   q[t, i] = round(x[t, i] / x_scale[t])

Inputs are quantised in every call with a scale per token, weights once with a scale per output: Dettmers et al.,
"LLM.int8()", 2022, without the separate treatment of outliers. Sums of integers are exact, so the result of a row does
not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op
from ..quantize_int8.op import quantize_int8
from .layout import pack_int8, unpack_int8


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, in_features, out_features in ((1, 4, 1), (1, 64, 5), (7, 132, 96), (64, 64, 64), (200, 124, 200)):
        x, weight, scale = _operands(draw, num_rows, in_features, out_features)
        name = f"{num_rows} x {in_features} to {out_features}"
        yield Sample(name, (x, weight, scale, None, out_features))
        yield Sample(
            f"{name} biased, float32", (x, weight, scale, draw.normal(out_features), out_features, torch.float32)
        )
    _, weight, scale = _operands(draw, 1, 64, 32)
    yield Sample("no rows", (draw.normal(0, 64), weight, scale, draw.normal(32), 32))
    mixed = draw.normal(9, 64) * 10.0 ** draw.integers(-3, 4, 9, 1).to(draw.dtype)
    mixed[3], mixed[4] = 0, 1e-35
    yield Sample("rows of different size, and zeros", (mixed, weight, scale, draw.normal(32), 32))
    wider, taller = draw.full(torch.nan, 9, 160), draw.full(torch.nan, 14, 64)
    wider[:, 32:96], taller[::2] = draw.normal(9, 64), draw.normal(7, 64)
    yield Sample("columns of a wider matrix", (wider[:, 32:96], weight, scale, None, 32))
    yield Sample("every other row", (taller[::2], weight, scale, None, 32))
    x, weight, scale = _operands(draw, 2, 8192, 70)
    yield Sample("sums that float32 does not hold", (x.abs(), weight, scale, None, 70))


def _operands(draw: Draw, num_rows: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns inputs, and a packed weight with its scales, whose product has numbers of about 1."""
    weight, scale = quantize_int8(draw.normal(out_features, in_features) * in_features**-0.5)
    return draw.normal(num_rows, in_features), pack_int8(weight), scale


# All implementations quantise to the same bits. Only the rounding of the scaled sum and of the result may differ.
@op(samples=_samples, tolerance={torch.float32: (1e-5, 1e-6), torch.bfloat16: (4e-3, 1e-6)})
def int8_linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantises rows to 8 bits and multiplies them by an 8-bit matrix.

    Args:
        x: `[num_rows, in_features]`, any stride between rows.
        packed: The weight as `pack_int8` returns it.
        weight_scale: `[out_features]` float32, the factor of each row of the weight.
        bias: `[out_features]`, the dtype of x, or None for 0.
        out_features: The number of rows of the weight, without the padding.
        dtype: The dtype of the result: float32, or None for that of x.

    Returns:
        `[num_rows, out_features]`. Sums are exact. They are scaled in float32, and rounded once.
    """
    quantised, x_scale = quantize_int8(x)
    sums = quantised.double() @ unpack_int8(packed, out_features).double().t()
    wide = torch.promote_types(x.dtype, torch.float32)
    out = sums.to(wide) * x_scale.to(wide)[:, None] * weight_scale.to(wide)
    return (out if bias is None else out + bias).to(dtype or x.dtype)
