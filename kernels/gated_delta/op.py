"""The gated delta rule: the definition.

For each head, with a state S of `[head_dim, key_dim]` that goes from token to token, and unit vectors q and k:

    S   = exp(rate · softplus(decay + decay_bias)) · S
    S   = S + sigmoid(beta) · (v - S k) ⊗ k
    out = S q / sqrt(key_dim)

The state is a memory that answers k with v: the rule first takes what it answers already from v. Value heads share the
query and the key of a group (Yang, Kautz and Hatamizadeh, 2024, arXiv:2412.06464, equation 10).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Draw, Sample, op
from .._states import old_states, sample_states, store_states

EPS = 1e-6
"""Number that is added to the square of the length of a query or a key."""


def _samples(draw: Draw) -> Iterator[Sample]:
    def inputs(
        heads: tuple[int, int], sizes: tuple[int, int], counts: list[int], computed: list[int], num_decodes: int = 0
    ) -> Sample:
        (num_heads, num_groups), (head_dim, key_dim) = heads, sizes
        wide = torch.promote_types(draw.dtype, torch.float32)
        num_tokens, *batch = sample_states(draw, counts, computed, (num_heads, head_dim, key_dim), wide)
        widths = num_groups * key_dim, num_groups * key_dim, num_heads * head_dim
        query, key, value = draw.normal(num_tokens, sum(widths)).split(widths, dim=1)  # views, as the layer passes them
        shared = (num_tokens, num_groups, key_dim)
        gates = draw.normal(num_tokens, 2 * num_heads + 1)[:, 1:].split(num_heads, dim=1)
        per_head = {
            "rate": -draw.normal(num_heads, dtype=wide).exp(),
            "decay_bias": draw.normal(num_heads, dtype=wide),
        }
        name = f"{num_heads} heads of {head_dim} x {key_dim}, {num_groups} groups, counts {counts}"
        state, *lengths = batch
        owners = dict(zip(("rows", "query_start_loc", "seq_lens"), lengths, strict=True))
        args = query.view(shared), key.view(shared), value.view(num_tokens, num_heads, head_dim), *gates, state
        return Sample(name, args, {**owners, **per_head, "num_decodes": num_decodes})

    yield inputs((1, 1), (1, 1), [1], [0])
    yield inputs((4, 2), (16, 32), [1, 1, 1], [7, 0, 2], num_decodes=3)
    yield inputs((3, 1), (31, 20), [1, 1, 23, 40, 1], [9, -1, 0, 5, 3], num_decodes=2)
    yield inputs((2, 1), (16, 16), [1, 1], [-1, -1], num_decodes=2)
    yield inputs((2, 2), (64, 128), [70], [0])


@op(
    samples=_samples, tolerance={torch.float32: (1e-4, 1e-4), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}
)
def gated_delta(
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
    """Runs the recurrence over the tokens of a step, from and to the states of their sequences.

    Args:
        query: `[num_tokens, num_groups, key_dim]`, not normed yet; tokens may have a stride, as in all of the inputs.
        key: The shape, strides and dtype of the query. Group g belongs to the heads `g * num_heads / num_groups` and
            following.
        value: `[num_tokens, num_heads, head_dim]` in the dtype of the query.
        decay: `[num_tokens, num_heads]` in the dtype of the query.
        beta: The shape, strides and dtype of `decay`.
        state: `[num_rows, num_heads, head_dim, key_dim]` float32, the state of the sequence that owns each row. It is
            changed in place.
        rows: `[num_seqs]` int32, the row of each sequence; -1 for padding, whose state is neither read nor written.
        query_start_loc: `[num_seqs + 1]` int32, prefix sums of the numbers of tokens of the sequences.
        seq_lens: `[num_seqs]` int32, number of tokens of each sequence, those of this step included.
        rate: `[num_heads]` float32, negative.
        decay_bias: `[num_heads]` float32.
        num_decodes: Number of sequences at the front that have one token each.

    Returns:
        `[num_tokens, num_heads, head_dim]` in the dtype of the query, contiguous.
    """
    wide, group_size = torch.promote_types(query.dtype, torch.float32), value.shape[1] // query.shape[1]
    query, key = (unit_vectors(each.to(wide)).repeat_interleave(group_size, dim=1) for each in (query, key))
    kept = (rate * F.softplus(decay.to(wide) + decay_bias)).exp()
    out, new = (
        torch.empty(value.shape, dtype=wide, device=value.device),
        old_states(state, rows, query_start_loc, seq_lens),
    )
    starts = query_start_loc.tolist()
    for sequence in range(len(rows)):
        for t in range(starts[sequence], starts[sequence + 1]):
            matrix = kept[t, :, None, None] * new[sequence]
            missing = value[t] - (matrix @ key[t, :, :, None]).squeeze(-1)
            new[sequence] = matrix + (beta[t].to(wide).sigmoid()[:, None] * missing)[:, :, None] * key[t, :, None, :]
            out[t] = (new[sequence] @ query[t, :, :, None]).squeeze(-1) * query.shape[-1] ** -0.5
    store_states(state, rows, new)
    return out.to(value.dtype)


def unit_vectors(x: Tensor) -> Tensor:
    """Divides vectors by their lengths."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
