"""The invariant linear layer on the CPU: products of a library, always with the same number of rows.

A library that gets the same shape in every call runs the same code in every call. In addition, neither the position of
a row within the chunk nor the number of threads may matter, and tests check both. oneDNN fulfils this. MKL, which torch
uses for float32 otherwise, does not: for some narrow shapes the order of its sums depends on the position of the row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import invariant_linear

CHUNK_ROWS = 16
"""A step of one row computes 16 (0.3 ms in place of 0.1 at 1024 to 3072). With many rows, short chunks cost 10 %."""


@invariant_linear.register("cpu")
def invariant_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Runs `invariant_linear` in chunks of 16 rows, of which the last one is padded."""
    out = torch.empty(len(x), weight.shape[0], dtype=dtype or x.dtype)
    for rows, result in zip(x.split(CHUNK_ROWS), out.split(CHUNK_ROWS), strict=True):
        chunk = F.pad(rows, (0, 0, 0, CHUNK_ROWS - len(rows)))
        result.copy_(_linear(chunk, weight, bias)[: len(rows)])
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies with oneDNN if it is available for the dtype. Packed weights are always for oneDNN."""
    if weight.is_mkldnn or (weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
