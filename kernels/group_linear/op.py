"""A linear layer of integers in groups: the definition.

    out[t, n] = Σ_k x[t, k] · W[n, k]  +  bias[n]
    W[n, k] = (code[n, k] - zero[n, k // g]) · scale[n, k // g],   g = in_features / num_groups

Codes are unsigned. A symmetric weight has no zeros: all are `2**(bits - 1)`. With one group each output has one scale.
Activations stay as they are: W4A16 and W8A16. Frantar et al., "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", 2022; Lin et al., "AWQ: Activation-aware Weight Quantization", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op
from .layout import pack_codes, unpack_codes


def _samples(draw: Draw) -> Iterator[Sample]:
    """Yields products of both widths, with groups of 32, 64, 128 and of a whole row, and rows of every kind."""
    for bits in (4, 8):
        yield _sample(draw, bits, (1, 128, 8), 1)
        yield _sample(draw, bits, (3, 192, 40), 3, has_zeros=True)
        yield _sample(draw, bits, (17, 256, 72), 2, has_zeros=True, has_bias=True)
        yield _sample(draw, bits, (64, 96, 136), 3, has_bias=True, dtype=torch.float32)
        yield _sample(draw, bits, (1, 1056, 24), 33, has_zeros=True)
        yield _sample(draw, bits, (2, 40, 16), 1, has_zeros=True, dtype=torch.float32)
        yield _sample(draw, bits, (0, 64, 32), 2)
    x, weight, scales, zeros, _ = _sample(draw, 4, (9, 64, 32), 2, has_zeros=True).args
    wider, taller = draw.full(torch.nan, 9, 160), draw.full(torch.nan, 18, 64)
    wider[:, 32:96], taller[::2] = x, x
    for name, rows in (("columns of a wider matrix", wider[:, 32:96]), ("every other row", taller[::2])):
        yield Sample(name, (rows, weight, scales, zeros, None), {"bits": 4})
    yield Sample("scales in float32", (x, weight, scales.float(), zeros, None), {"bits": 4})


def _sample(
    draw: Draw,
    bits: int,
    sizes: tuple[int, int, int],
    num_groups: int,
    *,
    has_zeros: bool = False,
    has_bias: bool = False,
    dtype: torch.dtype | None = None,
) -> Sample:
    """Returns a product of `sizes` (rows, inputs, outputs) whose results are about 1."""
    num_rows, in_features, out_features = sizes
    weight = pack_codes(draw.integers(0, 1 << bits, out_features, in_features, dtype=torch.uint8), bits)
    scales = draw.normal(out_features, num_groups).abs() * 2 ** (2 - bits) * in_features**-0.5
    zeros = draw.integers(0, 1 << bits, out_features, num_groups, dtype=torch.uint8) if has_zeros else None
    bias = draw.normal(out_features) if has_bias else None
    words = (f", {word}" for word, is_so in (("zeros", has_zeros), ("biased", has_bias), (str(dtype), dtype)) if is_so)
    name = f"{bits} bits, {num_rows} x {in_features} to {out_features}, {num_groups} groups{''.join(words)}"
    return Sample(
        name, (draw.normal(num_rows, in_features), weight, scales, zeros, bias), {"bits": bits, "dtype": dtype}
    )


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
)
def group_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiplies rows by a matrix of integers with a scale, and a zero, for each group of its columns.

    Args:
        x: `[num_rows, in_features]`, contiguous rows with any stride between them.
        weight: The codes as `pack_codes` returns them, `[out_features, num_words]` int32.
        scales: `[out_features, num_groups]`, float32 or 16 bits; num_groups divides in_features. A GPU reads
            them fastest if those of a group are next to each other in memory, and so the zeros: `by_groups` does that.
        zeros: `[out_features, num_groups]` uint8, or None for `2**(bits - 1)`.
        bias: `[out_features]`, the dtype of x, or None for 0.
        bits: 4 or 8.
        dtype: The dtype of the result: that of x or float32; None for that of x.

    Returns:
        `[num_rows, out_features]` in that dtype. Products are added up in float32, and rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    group_size = x.shape[1] // scales.shape[1]
    codes = unpack_codes(weight, bits, x.shape[1]).to(wide)
    zero = 1 << bits - 1 if zeros is None else zeros.to(wide).repeat_interleave(group_size, dim=1)
    matrix = (codes - zero) * scales.to(wide).repeat_interleave(group_size, dim=1)
    out = x.to(wide) @ matrix.t()
    return (out if bias is None else out + bias.to(wide)).to(dtype or x.dtype)
