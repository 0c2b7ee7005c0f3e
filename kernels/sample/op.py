"""Token sampling whose draws do not depend on the batch: the definition.

    s     = (logits - max) / temperature
    token = argmax over the kept tokens of  s + gumbel(seed, position, token id)

A token is kept if it passes min_p, then top_k, then top_p; ties with the last kept token are kept too. Adding Gumbel
noise and taking the largest draws from the softmax of s (Gumbel, 1954; "Gumbel-max").

Everything here is exact: integer hashes, float32 operations in a fixed order, sums of integers. So every
implementation must return the very same ids, whatever the order in which it visits the vocabulary. README.md has the
formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import op
from .exact import exp32, gumbel
from .samples import samples

MASS_SCALE = 2.0**40
"""A token's probability mass for top_p is floor(exp(s) · 2^40), so that sums are exact in any order."""


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
        temperature: `[num_rows]` float32, 0 for the most likely token (the lowest id of several).
        top_k: `[num_rows]` int32: keeps the k largest; 0 or less keeps all.
        top_p: `[num_rows]` float32: keeps the fewest largest whose share of the mass left by min_p and top_k reaches
            it; 1 or more keeps all.
        min_p: `[num_rows]` float32: keeps the tokens at least this many times as likely as the likeliest.
        seeds: `[num_rows]` int64, the seed of each request.
        positions: `[num_rows]` int64: which draw of that seed this is.

    Returns:
        The token ids, `[num_rows]` int64. -1 in a row whose largest logit is not finite: it holds NaN or plus infinity,
        or forbids every token. A row's draw depends on nothing but that row.
    """
    peaks, greedy = logits.max(-1)
    scaled = (logits - peaks.unsqueeze(-1)) / temperature.unsqueeze(-1)
    kept = _keep(scaled, top_k, top_p, log_min_p(min_p))
    noise = gumbel(seeds, positions, logits.shape[-1])
    drawn = torch.where(kept, scaled + noise, -torch.inf).argmax(-1)
    ids = torch.where(temperature > 0, drawn, greedy)
    return torch.where(peaks.isfinite(), ids, -1)


def log_min_p(min_p: Tensor) -> Tensor:
    """Returns the smallest s that passes min_p, `[num_rows]` float32: minus infinity where it is off."""
    return min_p.clamp(max=1.0).log()


def _keep(scaled: Tensor, top_k: Tensor, top_p: Tensor, lowest: Tensor) -> Tensor:
    """Returns which tokens may be drawn, `[num_rows, vocab_size]` bool."""
    vocab_size, lowest = scaled.shape[-1], lowest.unsqueeze(-1)
    ordered = scaled.masked_fill(scaled < lowest, -torch.inf).sort(dim=-1, descending=True).values
    last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long().unsqueeze(-1) - 1
    threshold = torch.maximum(lowest, ordered.gather(-1, last))
    mass = (exp32(ordered) * MASS_SCALE).long().masked_fill(ordered < threshold, 0).cumsum(-1)
    target = top_p.double().unsqueeze(-1) * mass[:, -1:].double()
    reached = (mass.double() < target).sum(-1, keepdim=True).clamp(max=vocab_size - 1)
    nucleus = torch.where(top_p.unsqueeze(-1) < 1, ordered.gather(-1, reached), -torch.inf)
    return scaled >= torch.maximum(threshold, nucleus)
