"""The invariant linear layer on the CPU: the library's product, but always of the same number of rows.

A library that is asked for the same shape every time does the same every time. Two more things must hold, and tests
check them: that a row's place within the chunk does not matter, and that the number of threads does not. They hold for
oneDNN. For MKL, which torch takes for float32 otherwise, they do not: it orders the sums of some narrow shapes by row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import invariant_linear

CHUNK_ROWS = 16
"""A step of one row pays for 16 (0.3 against 0.1 ms at 1024 to 3072); long ones lose 10 % to the short chunks."""


@invariant_linear.register("cpu")
def invariant_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Runs `invariant_linear` in chunks of 16 rows, the last one filled up."""
    out = torch.empty(len(x), weight.shape[0], dtype=x.dtype)
    for rows, result in zip(x.split(CHUNK_ROWS), out.split(CHUNK_ROWS), strict=True):
        chunk = F.pad(rows, (0, 0, 0, CHUNK_ROWS - len(rows)))
        result.copy_(_linear(chunk, weight, bias)[: len(rows)])
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies by oneDNN where it is there for the dtype, as it is for every packed weight."""
    if weight.is_mkldnn or (weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
