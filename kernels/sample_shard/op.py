"""The part of `sample` that a rank computes from its columns of the logits: the definition.

    s     = (logits - peak) / temperature
    score = max over the tokens that min_p keeps of  s + gumbel(seed, position, token id)

The largest score of all ranks, and of several equal ones that of the first rank, belongs to the token that `sample`
draws from whole rows. Ranks therefore exchange two numbers of each row in place of its logits. README.md says why top_k
and top_p are not among the filters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op
from ..sample.exact import SMALLEST_NOISE, gumbel
from ..sample.op import log_min_p


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, vocab_size, first_id in ((1, 1, 0), (3, 63, 17), (4, 1103, 4000), (2, 2100, 128_000)):
        logits = draw.normal(num_rows, vocab_size) * 4
        for name, offset in (("with the peak", 0.0), ("near the peak", 6.0), ("far from the peak", 80.0)):
            peaks = logits.amax(-1) + offset
            yield Sample(f"{name} {num_rows}x{vocab_size}", (logits, first_id, peaks, *_parameters(draw, num_rows)))
    tied, padded, impossible = (draw.normal(4, 300) * 2).round(), draw.normal(4, 200), draw.normal(4, 70)
    padded[:, 150:], padded[3] = -torch.inf, -torch.inf
    for name, logits in (("ties", tied), ("padded", padded), ("impossible rows", impossible)):
        peaks = logits.amax(-1).clamp(min=0.0)
        if name == "impossible rows":
            peaks[0], peaks[1], peaks[2] = torch.nan, torch.inf, -torch.inf
        yield Sample(name, (logits, 300, peaks, *_parameters(draw, 4)))
    yield Sample("no rows", (draw.normal(0, 64), 64, draw.normal(0), *_parameters(draw, 0)))


def _parameters(draw: Draw, num_rows: int) -> tuple[Tensor, ...]:
    return (
        draw.tensor([(1.0, 0.0, 0.6, 2.5)[i % 4] for i in range(num_rows)], torch.float32),
        draw.tensor([(0.0, 0.05, 0.01)[i % 3] for i in range(num_rows)], torch.float32),
        draw.integers(-(2**63), 2**63 - 1, num_rows),
        draw.integers(0, 10**6, num_rows),
    )


@op(samples=_samples, tolerance={torch.float32: (0.0, 0.0)})
def sample_shard(
    logits: Tensor,
    first_id: int,
    peaks: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the largest score of each row in some columns of the logits, and the token that has it.

    Args:
        logits: `[num_rows, num_columns]` float32, at least one column. Minus infinity forbids a token.
        first_id: Token id of the first column; the others follow.
        peaks: `[num_rows]` float32, the largest logit of the row in all columns of all ranks.
        temperature: `[num_rows]` float32.
        min_p: `[num_rows]` float32, as in `sample`.
        seeds: `[num_rows]` int64, the seed of each request.
        positions: `[num_rows]` int64, the number of the draw with that seed.

    Returns:
        Scores `[num_rows]` float32 and token ids `[num_rows]` int32, of several tokens with the score the lowest. They
        are minus infinity and -1 if no token scores at least `SMALLEST_NOISE`, which the most likely token of the row
        does; if the temperature is 0; and if the peak is not finite.
    """
    scaled = (logits - peaks.unsqueeze(-1)) / temperature.unsqueeze(-1)
    noise = gumbel(seeds, positions, logits.shape[-1], first_id)
    kept = scaled >= log_min_p(min_p).unsqueeze(-1)
    scores, columns = torch.where(kept, scaled + noise, -torch.inf).max(-1)
    return only_possible(scores, columns.int() + first_id, (temperature > 0) & peaks.isfinite())


def only_possible(scores: Tensor, token_ids: Tensor, is_drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces scores that no winner of a row can have, and their tokens, as `sample_shard` returns them."""
    is_possible = is_drawn & (scores >= SMALLEST_NOISE)
    return torch.where(is_possible, scores, -torch.inf), torch.where(is_possible, token_ids, -1)
