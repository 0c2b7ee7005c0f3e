"""A linear layer of 8-bit numbers: the definition.

    out[t, o] = x_scale[t] · weight_scale[o] · Σ_i x[t, i] · weight[o, i]  +  bias[o]

There is one scale per token and one per output channel. Neither depends on i, so the sum is scaled at the end.
Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op

E4M3 = torch.float8_e4m3fn


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, in_features, out_features in ((1, 16, 16), (1, 64, 48), (63, 128, 96), (130, 32, 16), (3, 1008, 144)):
        x, x_scale = draw.normal(num_rows, in_features, dtype=E4M3), _scales(draw, num_rows)
        weight, weight_scale = draw.normal(out_features, in_features, dtype=E4M3), _scales(draw, out_features)
        for bias in (None, draw.normal(out_features)):
            name = f"{num_rows} x {in_features} to {out_features}{'' if bias is None else ' biased'}"
            yield Sample(name, (x, x_scale, weight, weight_scale, bias, draw.dtype))
    none, weight = draw.normal(0, 64, dtype=E4M3), draw.normal(32, 64, dtype=E4M3)
    yield Sample("no rows", (none, _scales(draw, 0), weight, _scales(draw, 32), None, draw.dtype))
    largest = draw.tensor([448.0], torch.float32).expand(2, 64).to(E4M3).contiguous()
    tiny = draw.tensor([[2.0**-20], [0.0]], torch.float32)
    yield Sample("the largest numbers", (largest, tiny, weight, _scales(draw, 32), None, draw.dtype))


def _scales(draw: Draw, num_rows: int) -> Tensor:
    """Returns positive scales for rows of about 100 numbers, with which results are about 1."""
    return 0.05 + draw.normal(num_rows, 1, dtype=torch.float32).abs() / 4


@op(
    samples=_samples,
    # A GPU rounds the result to bfloat16 for every dtype. That error is smaller than the one of quantising the inputs.
    tolerance={torch.float32: (1.6e-2, 1.6e-2), torch.float16: (1.6e-2, 1.6e-2), torch.bfloat16: (2e-2, 2e-2)},
)
def scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiplies 8-bit rows by an 8-bit matrix and scales the result.

    Args:
        x: `[num_rows, in_features]` float8_e4m3fn, contiguous.
        x_scale: `[num_rows, 1]` float32, the factor of each row of x.
        weight: `[out_features, in_features]` float8_e4m3fn, contiguous.
        weight_scale: `[out_features, 1]` float32, the factor of each row of the weight.
        bias: `[out_features]` of dtype `dtype`, or None for 0.
        dtype: The dtype of the result.

    Returns:
        `[num_rows, out_features]`. Sums are in float32 or, on a GPU, in the precision of its 8-bit matrix unit.
    """
    wide = torch.promote_types(x_scale.dtype, torch.float32)
    out = (x.to(wide) @ weight.to(wide).t()) * x_scale * weight_scale.t()
    return (out if bias is None else out + bias).to(dtype)
