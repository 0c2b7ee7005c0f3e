"""A linear layer of a weight in 8-bit floats with scales of rows or of groups of columns: the definition.

    out[t, o] = Σ_g x_scale[t, g] · weight_scale[g, o] · Σ_(i in g) x[t, i] · weight[o, i]  +  bias[o]

A group is 128 columns, or all of them. Rows are plain, or in 8 bits with a scale for each of the same groups. A matrix
with a scale for each block of 128 x 128 numbers has groups of 128 in which neighbouring rows have equal scales.
DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.3.2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op

E4M3 = torch.float8_e4m3fn

GROUP = 128
"""Columns of a group, if there are several."""


def _samples(draw: Draw) -> Iterator[Sample]:
    shapes = ((1, 16, 16), (1, 640, 48), (3, 300, 20), (63, 256, 96), (130, 200, 70), (17, 1008, 144))
    for num_rows, in_features, out_features in shapes:
        for by_group in (False, True):
            for is_quantised in (False, True):
                bias = draw.normal(out_features) if by_group == is_quantised else None
                kind = f"{'groups' if by_group else 'rows'}{', 8 bits' if is_quantised else ''}"
                name = f"{num_rows} x {in_features} to {out_features}, {kind}{'' if bias is None else ', biased'}"
                yield _sample(draw, name, (num_rows, in_features, out_features), by_group, is_quantised, bias)
    yield _sample(draw, "no rows", (0, 256, 32), True, True, None)
    wider, (x, *others) = draw.full(torch.nan, 9, 400), _sample(draw, "", (9, 256, 48), True, False, None).args
    wider[:, 32:288] = x
    yield Sample("columns of a wider matrix", (wider[:, 32:288], *others))


def _sample(
    draw: Draw, name: str, sizes: tuple[int, int, int], by_group: bool, is_quantised: bool, bias: Tensor | None
) -> Sample:
    """Returns a product of `sizes` (rows, inputs, outputs) whose results are about 1."""
    num_rows, in_features, out_features = sizes
    num_groups = -(-in_features // GROUP) if by_group else 1
    x_scale = _scales(draw, num_rows, num_groups) if is_quantised else None
    x = draw.normal(num_rows, in_features, dtype=E4M3 if is_quantised else None)
    weight_scale = _scales(draw, num_groups, out_features) * in_features**-0.5
    weight = draw.normal(out_features, in_features, dtype=E4M3)
    return Sample(name, (x, x_scale, weight, weight_scale, bias, draw.dtype))


def _scales(draw: Draw, *shape: int) -> Tensor:
    return 0.25 + draw.normal(*shape, dtype=torch.float32).abs()


@op(
    samples=_samples,
    # A GPU adds up the 8-bit products of a group with about 14 bits, where the inputs have 4.
    tolerance={torch.float32: (2e-3, 2e-3), torch.float16: (4e-3, 4e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
)
def fp8_linear(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiplies rows by a matrix of 8-bit floats.

    Args:
        x: `[num_rows, in_features]`, contiguous rows; float8_e4m3fn with scales, or `dtype` without.
        x_scale: `[num_rows, num_groups]` float32, contiguous, the factor of each group of x; None for plain rows.
        weight: `[out_features, in_features]` float8_e4m3fn, contiguous.
        weight_scale: `[num_groups, out_features]` float32, contiguous, the factor of each group of the weight;
            num_groups is 1, or `ceil(in_features / 128)`.
        bias: `[out_features]` of dtype `dtype`, or None for 0.
        dtype: The dtype of the result.

    Returns:
        `[num_rows, out_features]`. Sums are in float32 or, of 8-bit rows in a group, in the precision of the GPU's
        8-bit matrix unit.
    """
    wide = torch.promote_types(weight_scale.dtype, torch.float32)
    matrix = weight.to(wide) * _by_column(weight_scale.to(wide).t(), weight.shape[1])
    rows = x.to(wide)
    if x_scale is not None:
        rows = rows * _by_column(x_scale.to(wide), weight.shape[1])
    out = rows @ matrix.t()
    return (out if bias is None else out + bias).to(dtype)


def _by_column(scales: Tensor, num_columns: int) -> Tensor:
    """Returns the scale of each column, `[num_rows, num_columns]` or `[num_rows, 1]`, from those of groups."""
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(GROUP, dim=1)[:, :num_columns]
