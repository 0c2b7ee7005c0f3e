"""Token sampling whose draws do not depend on the batch: the definition.

    s     = (logits - max) / temperature
    token = argmax over the kept tokens of  s + gumbel(seed, position, token id)

A token is kept if it passes min_p, then top_k, then top_p. Tokens that tie with the last kept token are kept too. The
largest sum of s and Gumbel noise is a draw from the softmax of s (Gumbel, 1954; "Gumbel-max").

All arithmetic is exact: integer hashes, float32 operations in a fixed order, and sums of integers. Every implementation
must therefore return the same ids, in whatever order it reads the vocabulary. README.md has the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import op
from .exact import exp32, gumbel
from .samples import samples

MASS_SCALE = 2.0**40
"""The probability mass of a token for top_p is floor(exp(s) · 2^40), so that sums are exact in any order."""


@op(samples=samples, tolerance={torch.float32: (0.0, 0.0)})
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Draws one token per row.

    Args:
        logits: `[num_rows, vocab_size]` float32. Minus infinity forbids a token.
        temperature: `[num_rows]` float32. At 0 the most likely token is returned, and of several the lowest id.
        top_k: `[num_rows]` int32. The k most likely tokens are kept, or all for 0 or less.
        top_p: `[num_rows]` float32. Of the tokens that min_p and top_k keep, the fewest most likely ones are kept that
            have at least this share of their probability, or all for 1 or more.
        min_p: `[num_rows]` float32. Tokens are kept if their probability is at least this share of the largest one.
        seeds: `[num_rows]` int64, the seed of each request.
        positions: `[num_rows]` int64, the number of the draw with that seed.

    Returns:
        The token ids, `[num_rows]` int64. The id is -1 if the largest logit of the row is not finite, which means that
        the row contains NaN or plus infinity, or forbids every token. The draw of a row depends on that row only.
    """
    peaks, greedy = logits.max(-1)
    scaled = (logits - peaks.unsqueeze(-1)) / temperature.unsqueeze(-1)
    kept = _keep(scaled, top_k, top_p, log_min_p(min_p))
    noise = gumbel(seeds, positions, logits.shape[-1])
    drawn = torch.where(kept, scaled + noise, -torch.inf).argmax(-1)
    ids = torch.where(temperature > 0, drawn, greedy)
    return torch.where(peaks.isfinite(), ids, -1)


def log_min_p(min_p: Tensor) -> Tensor:
    """Returns the smallest scaled logit that min_p keeps, `[num_rows]` float32.

    Scaled logits are (logits - max) / temperature, so the result is log(min_p), and minus infinity for a min_p of 0.
    """
    return min_p.clamp(max=1.0).log()


def _keep(scaled: Tensor, top_k: Tensor, top_p: Tensor, lowest: Tensor) -> Tensor:
    """Returns a mask of the tokens that are kept, `[num_rows, vocab_size]` bool."""
    vocab_size, lowest = scaled.shape[-1], lowest.unsqueeze(-1)
    ordered = scaled.masked_fill(scaled < lowest, -torch.inf).sort(dim=-1, descending=True).values
    last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long().unsqueeze(-1) - 1
    threshold = torch.maximum(lowest, ordered.gather(-1, last))
    mass = (exp32(ordered) * MASS_SCALE).long().masked_fill(ordered < threshold, 0).cumsum(-1)
    target = top_p.double().unsqueeze(-1) * mass[:, -1:].double()
    reached = (mass.double() < target).sum(-1, keepdim=True).clamp(max=vocab_size - 1)
    nucleus = torch.where(top_p.unsqueeze(-1) < 1, ordered.gather(-1, reached), -torch.inf)
    return scaled >= torch.maximum(threshold, nucleus)
