"""Lookup of the rows of a table by id: the definition.

out[i] = table[ids[i]]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_ids, num_rows, size in ((1, 1, 1), (5, 3, 63), (63, 40, 64), (200, 9, 130)):
        ids, table = draw.integers(0, num_rows, num_ids), draw.normal(num_rows, size)
        yield Sample(f"{num_ids} of {num_rows} x {size}", (ids, table))
    yield Sample("none", (draw.integers(0, 4, 0), draw.normal(4, 16)))


@op(samples=_samples, tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), (0.0, 0.0)))
def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Returns the rows of a table with the given ids.

    Args:
        ids: `[num_ids]` int64, in `[0, num_rows)`.
        table: `[num_rows, size]`, contiguous.

    Returns:
        `[num_ids, size]`, in the dtype of the table.
    """
    return F.embedding(ids, table)
