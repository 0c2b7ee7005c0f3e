"""Log-probabilities of the chosen and of the best tokens: the definition.

    logprob(token) = logit(token) - logsumexp(logits)

The log-softmax of the whole vocabulary is not computed: only its normaliser needs all logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    for num_rows, vocab_size, k in ((1, 1, 1), (1, 63, 0), (3, 123, 5), (7, 1000, 20)):
        logits = draw.normal(num_rows, vocab_size) * 5
        yield Sample(f"{num_rows}x{vocab_size} top {k}", (logits, draw.integers(0, vocab_size, num_rows), k))
    masked = draw.normal(2, 64)
    masked[:, ::3] = -torch.inf
    yield Sample("masked tokens", (masked, draw.tensor([1, 3], torch.int64), 4))
    yield Sample("no rows", (draw.normal(0, 64), draw.integers(0, 64, 0), 2))


@op(samples=_samples, tolerance={torch.float32: (1e-5, 1e-5)})
def top_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, for each row, the log-probabilities of one given token and of the k most likely ones.

    Args:
        logits: `[num_rows, vocab_size]` float32.
        token_ids: `[num_rows]` int64, each in `[0, vocab_size)`.
        k: The number of most likely tokens, `0 <= k <= vocab_size`. The choice between tied tokens is undefined.

    Returns:
        The log-probabilities `[num_rows, k + 1]` float32 and token ids `[num_rows, k + 1]` int64, with the given token
        in column 0 and then the most likely ones in falling order. And the rank of the given token, `[num_rows]` int64:
        1 + the number of strictly larger logits.
    """
    chosen = token_ids.unsqueeze(-1)
    chosen_logits = logits.gather(-1, chosen)
    best_logits, best = logits.topk(k, dim=-1)
    logprobs = torch.cat((chosen_logits, best_logits), dim=-1) - logits.logsumexp(-1, keepdim=True)
    ranks = 1 + (logits > chosen_logits).sum(-1)
    return logprobs, torch.cat((chosen, best), dim=-1), ranks
