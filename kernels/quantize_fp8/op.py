"""Quantisation of rows to 8-bit floats with a scale per row: the definition.

    scale = max|row| / 448  (1 for a row of zeros),   q = round_e4m3(row / scale)

448 is the largest number of float8_e4m3fn, so every row uses the whole range: Micikevicius et al., "FP8
Formats for Deep Learning", 2022.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, size in ((1, 1), (63, 63), (5, 1000), (2, 20_000)):
        yield Sample(f"{num_rows}x{size}", (draw.normal(num_rows, size),))
    yield Sample("no rows", (draw.normal(0, 64),))
    yield Sample("zeros", (draw.full(0.0, 3, 64),))
    yield Sample("rows of different size", (draw.normal(7, 48) * (10.0 ** draw.integers(-3, 4, 7, 1)).to(draw.dtype),))
    yield Sample("every other row", (draw.normal(14, 48)[::2],))


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 0.0), torch.float16: (1e-5, 0.0), torch.bfloat16: (1e-5, 0.0)},
)
def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to 8 bits, relative to its largest number.

    Args:
        x: `[num_rows, size]`, contiguous rows with any stride between them. They are activations, or the weight of a
            linear layer with a row per output.

    Returns:
        `[num_rows, size]` float8_e4m3fn, and the scale of each row, `[num_rows, 1]` float32. Their product approximates
        x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    return (wide / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale.to(torch.float32)
