"""Quantisation of rows to 8-bit integers: the definition.

    dynamic:  scale = max|row| / 127,   q = round(row / scale)
    static:   q = clamp(round(x / scale + zero_point), -128, 127)

Dynamic rows use the range from -127 to 127, with a zero of 0: Dettmers et al., "LLM.int8()", 2022. A static scale is
that of a checkpoint, and was measured on other rows. Numbers beyond its range become the ends of the range, and are not
an error. Ties are rounded to even.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op

INT8_MAX = 127

SMALLEST = 1e-30
"""A row whose numbers are all smaller counts as zeros, because the inverse of its scale might not fit float32."""


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, size in ((1, 1), (63, 63), (5, 1000), (2, 20_000)):
        yield Sample(f"{num_rows}x{size}", (draw.normal(num_rows, size),))
    yield Sample("no rows", (draw.normal(0, 64),))
    mixed = draw.normal(9, 48) * (10.0 ** draw.integers(-3, 4, 9, 1)).to(draw.dtype)
    mixed[3], mixed[4] = 0, 1e-35
    yield Sample("rows of different size, and zeros", (mixed,))
    yield Sample("every other row", (draw.normal(14, 48)[::2],))
    scale = draw.tensor([1 / 64], torch.float32)  # A power of two, so that many numbers are ties.
    steps = draw.integers(-700, 700, 7, 300).to(draw.dtype) / 256
    yield Sample("a given scale, with ties, beyond the range", (steps, scale))
    for zero_point in (-128, 5, 127):
        given = (scale, draw.tensor([zero_point], torch.int32))
        yield Sample(f"a given scale and {zero_point}", (draw.normal(3, 20_000), *given))


# The arithmetic is in float32 for every dtype, so all implementations give the same bits.
@op(samples=_samples, tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), (0.0, 0.0)))
def quantize_int8(x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rounds rows to 8-bit integers, each relative to its largest number, or all by a given scale.

    The arithmetic is in float32 for every dtype, and the result is defined to the bit.

    Args:
        x: `[num_rows, size]`, contiguous rows with any stride between them. They are activations, or the weight of a
            linear layer with a row per output.
        scale: `[1]` float32, the scale of all rows; None for one of each row.
        zero_point: `[1]` int32, the integer of the number 0 under a given scale; None for 0.

    Returns:
        `[num_rows, size]` int8, and the scale of each row, `[num_rows]` float32. The product of integers less the zero
        point, and scales, approximates x. Without a given scale, the scale of a row that contains NaN is NaN, and that
        of a row with an infinity is infinite; their integers are 0.
    """
    wide = x.to(torch.float32)
    if scale is not None:
        shifted = wide / scale if zero_point is None else wide / scale + zero_point
        rounded = shifted.clamp_(-INT8_MAX - 1, INT8_MAX).round_()
        return rounded.nan_to_num_(0.0).to(torch.int8), scale.to(torch.float32).repeat(len(x))
    largest = wide.abs().amax(-1) if x.shape[-1] else wide.new_zeros(len(wide))
    # torch computes a Python number over a tensor as reciprocal times number, which rounds twice.
    inverse = torch.where(largest > SMALLEST, largest.new_tensor(INT8_MAX) / largest, 0.0)
    return (wide * inverse[:, None]).round_().nan_to_num_(0.0).to(torch.int8), largest * (1 / INT8_MAX)
