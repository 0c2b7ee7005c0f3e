"""A linear layer with rows that do not depend on the batch: the definition.

    out = x · weightᵀ + bias

In addition every implementation guarantees that a row of the result is the same to the bit for any number of other rows
and at any position among them. The products of libraries do not: they choose their tiles, and with them the order of
their sums, by the number of rows. He et al., "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab, 2025.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, in_features, out_features in ((1, 1, 1), (1, 63, 5), (63, 64, 96), (130, 123, 17), (3, 1000, 130)):
        x, weight = draw.normal(num_rows, in_features), draw.normal(out_features, in_features) * in_features**-0.5
        yield Sample(f"{num_rows} x {in_features} to {out_features}", (x, weight, None))
        yield Sample(f"{num_rows} x {in_features} to {out_features} biased", (x, weight, draw.normal(out_features)))
    x, weight = draw.normal(20, 100), draw.normal(30, 100) / 10
    yield Sample("to float32", (x, weight, None, torch.float32))
    yield Sample("to float32 biased", (x, weight, draw.normal(30), torch.float32))
    yield Sample("no rows", (draw.normal(0, 64), draw.normal(32, 64), draw.normal(32)))
    wider, taller = draw.full(torch.nan, 9, 160), draw.full(torch.nan, 14, 48)
    wider[:, 32:96], taller[::2] = draw.normal(9, 64), draw.normal(7, 48)
    yield Sample("columns of a wider matrix", (wider[:, 32:96], draw.normal(48, 64) / 8, None))
    yield Sample("every other row", (taller[::2], draw.normal(24, 48) / 7, draw.normal(24)))


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
)
def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Multiplies rows by a matrix, so that no bit of a row depends on the other rows.

    Args:
        x: `[num_rows, in_features]`, contiguous rows with any stride between them.
        weight: `[out_features, in_features]`, contiguous, the dtype of x. A CPU also takes oneDNN's packed layout.
        bias: `[out_features]`, the dtype of x, or None for 0.
        dtype: The dtype of the result: that of x or float32; None for that of x.

    Returns:
        `[num_rows, out_features]` in that dtype. Sums are in float32, and are rounded once. (On a CPU they are rounded
        to the dtype of x first.)
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide) @ weight.to(wide).t()
    return (out if bias is None else out + bias).to(dtype or x.dtype)
