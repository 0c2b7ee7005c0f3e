"""The gated delta rule on the CPU, in torch: all decodes at once, prompts in chunks of matrix products.

Within a chunk that starts from state S, with `total = cumsum(rate · softplus(decay))`, token t adds `u[t] ⊗ k[t]`, and

    u[t] = beta[t] · (v[t] - exp(total[t]) · S k[t] - sum over s < t of exp(total[t] - total[s]) · (k[t] · k[s]) · u[s])

is a triangular system (Yang et al., 2024, arXiv:2412.06464, section 3.3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._states import old_states, store_states
from .op import gated_delta, unit_vectors

_CHUNK = 64


@gated_delta.register("cpu")
def gated_delta_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    rate: Tensor,
    decay_bias: Tensor,
    num_decodes: int = 0,
) -> Tensor:
    """Runs `gated_delta` with few operations of torch."""
    wide, group_size = torch.promote_types(query.dtype, torch.float32), value.shape[1] // query.shape[1]
    query, key = (unit_vectors(each.to(wide)).repeat_interleave(group_size, dim=1) for each in (query, key))
    query, strength = query * query.shape[-1] ** -0.5, beta.to(wide).sigmoid()
    log_kept, value = rate * F.softplus(decay.to(wide) + decay_bias), value.to(wide)
    out, new = torch.empty(value.shape, dtype=wide), old_states(state, rows, query_start_loc, seq_lens)
    if num_decodes:
        one = slice(num_decodes)
        matrices = log_kept[one].exp()[..., None, None] * new[one]
        missing = strength[one, :, None] * (value[one] - (matrices @ key[one].unsqueeze(-1)).squeeze(-1))
        new[one] = matrices + missing.unsqueeze(-1) * key[one].unsqueeze(-2)
        out[one] = (new[one] @ query[one].unsqueeze(-1)).squeeze(-1)
    starts = query_start_loc.tolist()
    for sequence in range(num_decodes, len(rows)):
        for begin in range(starts[sequence], starts[sequence + 1], _CHUNK):
            tokens = slice(begin, min(begin + _CHUNK, starts[sequence + 1]))
            inputs = (each[tokens].transpose(0, 1) for each in (query, key, value, log_kept, strength))
            parts = (*inputs, new[sequence])
            result, new[sequence] = _run_chunk(*parts)
            out[tokens] = result.transpose(0, 1)
    store_states(state, rows, new)
    return out.to(beta.dtype)


def _run_chunk(
    query: Tensor, key: Tensor, value: Tensor, log_kept: Tensor, strength: Tensor, old: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the outputs of a chunk of one sequence and its new state.

    Args:
        query: `[num_heads, num_tokens, key_dim]`, scaled.
        key: The shape of the query.
        value: `[num_heads, num_tokens, head_dim]`.
        log_kept: `[num_heads, num_tokens]`, logarithm of the factor on the state.
        strength: `[num_heads, num_tokens]`, the part of what is missing that is added.
        old: `[num_heads, head_dim, key_dim]`, the state before the chunk.
    """
    total = log_kept.cumsum(-1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp().tril()
    kept = total.exp().unsqueeze(-1)
    system = strength.unsqueeze(-1) * between * (key @ key.mT)
    missing = strength.unsqueeze(-1) * (value - kept * (key @ old.mT))
    added = torch.linalg.solve_triangular(system, missing, upper=False, unitriangular=True)
    out = kept * (query @ old.mT) + (between * (query @ key.mT)) @ added
    last = total[:, -1:, None]
    return out, last.exp() * old + added.mT @ (key * (last - total.unsqueeze(-1)).exp())
