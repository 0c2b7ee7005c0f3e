"""The most likely token of each row: the definition."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, vocab_size in ((1, 1), (3, 63), (8, 1000), (12, 5003)):
        yield Sample(f"{num_rows} x {vocab_size}", (draw.normal(num_rows, vocab_size),))
    tied = draw.integers(0, 3, 9, 130).float()
    yield Sample("ties", (tied,))
    awkward = draw.normal(5, 70)
    awkward[0, 3], awkward[1, 69], awkward[2, :69], awkward[3] = torch.nan, torch.inf, -torch.inf, -torch.inf
    yield Sample("not finite", (awkward,))
    yield Sample("rows apart", (draw.normal(6, 200)[:, :150],))


@op(samples=_samples, tolerance={torch.float32: (0.0, 0.0)})
def greedy(logits: Tensor) -> Tensor:
    """Returns the most likely token of each row, and of several equal ones the first.

    The result is that of `sample` at temperature 0. A batch in which no row draws does not need the other parameters.

    Args:
        logits: `[num_rows, vocab_size]` float32. Minus infinity forbids a token.

    Returns:
        The token ids, `[num_rows]` int64. The id is -1 if the largest logit of the row is not finite, which means that
        the row contains NaN or plus infinity, or forbids every token.
    """
    peaks, ids = logits.max(-1)
    return torch.where(peaks.isfinite(), ids, -1)
