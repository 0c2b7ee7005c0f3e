"""Quantisation of rows to 8-bit floats with a scale per row, or per group of columns: the definition.

    scale = max|row| / 448  (1 for a row of zeros),   q = round_e4m3(clamp(row / scale, -448, 448))

448 is the largest number of float8_e4m3fn, so every row uses the whole range: Micikevicius et al., "FP8
Formats for Deep Learning", 2022. With groups, the formula is that of each group of consecutive columns: DeepSeek-AI,
"DeepSeek-V3 Technical Report", 2024, section 3.3.2. A given scale is that of a checkpoint, and was measured on other
rows; larger numbers become the largest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
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
    mixed = draw.normal(5, 300) * (10.0 ** draw.integers(-3, 4, 5, 300)).to(draw.dtype)
    mixed[2, 128:256] = 0
    for num_rows, size in ((5, 128), (5, 300), (3, 5000)):
        x = mixed if size == 300 else draw.normal(num_rows, size)
        yield Sample(f"{num_rows}x{size} in groups", (x,), {"group_size": 128})
    yield Sample("no rows in groups", (draw.normal(0, 64),), {"group_size": 128})
    scale = draw.tensor([1 / 128], torch.float32)
    yield Sample("a given scale, beyond the range", (draw.normal(5, 1000) * 3, scale))
    yield Sample("no rows and a given scale", (draw.normal(0, 64), scale))


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 0.0), torch.float16: (1e-5, 0.0), torch.bfloat16: (1e-5, 0.0)},
)
def quantize_fp8(x: Tensor, scale: Tensor | None = None, *, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Rounds rows to 8 bits, each relative to its largest number, or all by a given scale.

    Args:
        x: `[num_rows, size]`, contiguous rows with any stride between them. They are activations, or the weight of a
            linear layer with a row per output.
        scale: `[1]` float32, the scale of all rows; None for one of each row or group.
        group_size: Number of columns that share a scale, a power of two; the last group of a row may have fewer. None
            for the whole row.

    Returns:
        `[num_rows, size]` float8_e4m3fn, and the scale of each row, `[num_rows, 1]` float32, or of each group,
        `[num_rows, ceil(size / group_size)]`. Their product approximates x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        return _narrow(wide / scale), scale.to(torch.float32).repeat(len(x), 1)
    size = x.shape[1]
    group_size = size if group_size is None else group_size
    groups = F.pad(wide, (0, -size % group_size)).unflatten(1, (-1, group_size))
    largest = groups.abs().amax(-1, keepdim=True)
    scales = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    return _narrow(groups / scales).flatten(1)[:, :size].contiguous(), scales.squeeze(-1).to(torch.float32)


def _narrow(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
