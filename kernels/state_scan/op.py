"""The recurrence of Mamba-2: the definition.

For each head, with a state S of `[head_dim, state_size]` that goes from token to token:

    step = softplus(dt + dt_bias)
    S    = exp(step · rate) · S + step · x ⊗ b
    out  = S c + skip · x

Heads share b and c in groups (Dao and Gu, 2024, arXiv:2405.21060, section 7; `rate` is their A).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Draw, Sample, op
from .._states import old_states, sample_states, store_states


def _samples(draw: Draw) -> Iterator[Sample]:
    def inputs(
        heads: tuple[int, int], sizes: tuple[int, int], counts: list[int], computed: list[int], num_decodes: int = 0
    ) -> Sample:
        (num_heads, num_groups), (head_dim, state_size) = heads, sizes
        wide = torch.promote_types(draw.dtype, torch.float32)
        num_tokens, *batch = sample_states(draw, counts, computed, (num_heads, head_dim, state_size), wide)
        widths = num_heads * head_dim, num_groups * state_size, num_groups * state_size
        x, b, c = draw.normal(num_tokens, sum(widths)).split(widths, dim=1)  # views, as the layer passes them
        shared = (num_tokens, num_groups, state_size)
        per_head = {
            "rate": -draw.normal(num_heads, dtype=wide).exp(),
            "dt_bias": draw.normal(num_heads, dtype=wide),
            "skip": draw.normal(num_heads, dtype=wide),
        }
        args = x.view(num_tokens, num_heads, head_dim), draw.normal(num_tokens, num_heads + 3)[:, 3:]
        name = f"{num_heads} heads of {head_dim} x {state_size}, {num_groups} groups, counts {counts}"
        return Sample(name, (*args, b.view(shared), c.view(shared), *batch), {**per_head, "num_decodes": num_decodes})

    yield inputs((1, 1), (1, 1), [1], [0])
    yield inputs((4, 2), (16, 32), [1, 1, 1], [7, 0, 2], num_decodes=3)
    yield inputs((3, 1), (31, 20), [1, 1, 23, 40, 1], [9, -1, 0, 5, 3], num_decodes=2)
    yield inputs((2, 1), (16, 16), [1, 1], [-1, -1], num_decodes=2)
    yield inputs((2, 2), (64, 128), [70], [0])


@op(
    samples=_samples, tolerance={torch.float32: (1e-4, 1e-4), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}
)
def state_scan(
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
    """Runs the recurrence over the tokens of a step, from and to the states of their sequences.

    Args:
        x: `[num_tokens, num_heads, head_dim]`; tokens may have a stride, as in all of the inputs.
        dt: `[num_tokens, num_heads]` in the dtype of x.
        b: `[num_tokens, num_groups, state_size]` in the dtype of x; group g belongs to the heads
            `g * num_heads / num_groups` and following.
        c: The shape, strides and dtype of b.
        state: `[num_rows, num_heads, head_dim, state_size]` float32, the state of the sequence that owns each row.
            It is changed in place.
        rows: `[num_seqs]` int32, the row of each sequence; -1 for padding, whose state is neither read nor written.
        query_start_loc: `[num_seqs + 1]` int32, prefix sums of the numbers of tokens of the sequences.
        seq_lens: `[num_seqs]` int32, number of tokens of each sequence, those of this step included.
        rate: `[num_heads]` float32, negative.
        dt_bias: `[num_heads]` float32.
        skip: `[num_heads]` float32.
        num_decodes: Number of sequences at the front that have one token each.

    Returns:
        `[num_tokens, num_heads, head_dim]` in the dtype of x, contiguous.
    """
    wide, group_size = torch.promote_types(x.dtype, torch.float32), x.shape[1] // b.shape[1]
    step = F.softplus(dt.to(wide) + dt_bias)
    b, c = (each.to(wide).repeat_interleave(group_size, dim=1) for each in (b, c))
    out, new = torch.empty(x.shape, dtype=wide, device=x.device), old_states(state, rows, query_start_loc, seq_lens)
    for sequence, (begin, end) in enumerate(
        zip(query_start_loc[:-1].tolist(), query_start_loc[1:].tolist(), strict=True)
    ):
        for t in range(begin, end):
            added = (step[t, :, None] * x[t])[:, :, None] * b[t, :, None, :]
            new[sequence] = (step[t] * rate).exp()[:, None, None] * new[sequence] + added
            out[t] = (new[sequence] @ c[t, :, :, None]).squeeze(-1) + skip[:, None] * x[t]
    store_states(state, rows, new)
    return out.to(x.dtype)
