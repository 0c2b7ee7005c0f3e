"""The recurrence of Mamba-2 on the CPU, in torch: all decodes at once, prompts in chunks of matrix products.

Within a chunk of tokens that starts from state S, with `decay = cumsum(step · rate)`:

    out[t] = exp(decay[t]) · S c[t] + sum over s <= t of exp(decay[t] - decay[s]) · step[s] · (c[t] · b[s]) · x[s]

(Dao and Gu, 2024, arXiv:2405.21060, section 6).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._states import old_states, store_states
from .op import state_scan

_CHUNK = 64


@state_scan.register("cpu")
def state_scan_cpu(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    rate: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    num_decodes: int = 0,
) -> Tensor:
    """Runs `state_scan` with few operations of torch."""
    wide, group_size = torch.promote_types(x.dtype, torch.float32), x.shape[1] // b.shape[1]
    step = F.softplus(dt.to(wide) + dt_bias)
    decay, moved = step * rate, step.unsqueeze(-1) * x
    b, c = (each.to(wide).repeat_interleave(group_size, dim=1) for each in (b, c))
    out, new = torch.empty(x.shape, dtype=wide), old_states(state, rows, query_start_loc, seq_lens)
    if num_decodes:
        one = slice(num_decodes)
        new[one] = decay[one].exp()[..., None, None] * new[one] + moved[one].unsqueeze(-1) * b[one].unsqueeze(-2)
        out[one] = (new[one] @ c[one].unsqueeze(-1)).squeeze(-1)
    starts = query_start_loc.tolist()
    for sequence in range(num_decodes, len(rows)):
        for begin in range(starts[sequence], starts[sequence + 1], _CHUNK):
            tokens = slice(begin, min(begin + _CHUNK, starts[sequence + 1]))
            parts = (*(each[tokens].transpose(0, 1) for each in (decay, moved, b, c)), new[sequence])
            result, new[sequence] = _scan_chunk(*parts)
            out[tokens] = result.transpose(0, 1)
    store_states(state, rows, new)
    return (out + skip.unsqueeze(-1) * x).to(x.dtype)


def _scan_chunk(decay: Tensor, moved: Tensor, b: Tensor, c: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the outputs of a chunk of one sequence, without the skip, and its new state.

    Args:
        decay: `[num_heads, num_tokens]`, logarithm of the factor on the state.
        moved: `[num_heads, num_tokens, head_dim]`, the scaled inputs.
        b: `[num_heads, num_tokens, state_size]`.
        c: The shape of b.
        old: `[num_heads, head_dim, state_size]`, the state before the chunk.
    """
    total = decay.cumsum(-1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp().tril()
    out = (c @ b.mT * between) @ moved + total.exp().unsqueeze(-1) * (c @ old.mT)
    last = total[:, -1:]
    return out, last.exp().unsqueeze(-1) * old + (moved * (last - total).exp().unsqueeze(-1)).mT @ b
