"""A linear layer of 8-bit integers: the definition.

    out[t, o] = x_scale[t] · weight_scale[o] · Σ_i x[t, i] · weight[o, i]  +  bias[o]

If the inputs have a zero point, it adds the same to each row of the result, which goes into the bias (`zero_bias`):

    Σ_i (x[t, i] - zero) · weight[o, i]  =  Σ_i x[t, i] · weight[o, i]  -  zero · Σ_i weight[o, i]

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018. Sums
of integers are exact, so the result of a row does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, in_features, out_features in (
        (1, 4, 1),
        (1, 640, 48),
        (63, 132, 96),
        (130, 100, 70),
        (17, 1008, 144),
    ):
        operands = _operands(draw, num_rows, in_features, out_features)
        name = f"{num_rows} x {in_features} to {out_features}"
        yield Sample(name, (*operands, None, draw.dtype))
        bias = draw.normal(out_features, dtype=torch.float32)
        yield Sample(f"{name} biased", (*operands, bias, draw.dtype))
    yield Sample("no rows", (*_operands(draw, 0, 64, 32), None, draw.dtype))
    yield Sample("few outputs, many inputs", (*_operands(draw, 3, 5000, 20), None, draw.dtype))
    largest = draw.tensor([127], torch.int8).expand(2, 2048).contiguous()
    scales = draw.tensor([2.0**-15, 0.0], torch.float32), draw.tensor([2.0**-10, 1.0], torch.float32)
    # float32 does not hold the sum, which is 2048 · 127² less 127.
    weight = largest.clone()
    weight[:, 7] = 126
    yield Sample("the largest sums", (largest, scales[0], weight, scales[1], None, draw.dtype))


def _operands(draw: Draw, num_rows: int, in_features: int, out_features: int) -> tuple[Tensor, ...]:
    """Returns rows and a weight with their scales, whose product has numbers of about 1."""
    x = draw.integers(-128, 128, num_rows, in_features, dtype=torch.int8)
    weight = draw.integers(-128, 128, out_features, in_features, dtype=torch.int8)
    scales = (draw.normal(rows, dtype=torch.float32).abs() / 74 for rows in (num_rows, out_features))
    return x, next(scales), weight, next(scales) * in_features**-0.5


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)},
)
def scaled_int8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiplies rows of 8-bit integers by a matrix of them, and scales the result.

    Args:
        x: `[num_rows, in_features]` int8, contiguous rows; at most 130,000 inputs, so that sums fit 32 bits.
        x_scale: `[num_rows]` float32, the factor of each row of x.
        weight: `[out_features, in_features]` int8, contiguous.
        weight_scale: `[out_features]` float32, the factor of each row of the weight.
        bias: `[out_features]` float32, or None for 0.
        dtype: The dtype of the result.

    Returns:
        `[num_rows, out_features]`. Sums are exact. They are scaled in float32, and rounded once.
    """
    wide = torch.promote_types(x_scale.dtype, torch.float32)
    sums = (x.double() @ weight.double().t()).to(wide)
    out = sums * x_scale[:, None] * weight_scale
    return (out if bias is None else out + bias).to(dtype)
