"""States of sequences in ops: which row of a state tensor a sequence owns, and whether it starts with zeros.

A step has the tokens of several sequences behind each other. Sequence b has the tokens
`query_start_loc[b]:query_start_loc[b + 1]` and owns row `rows[b]` of the state tensor, or is padding if that is -1. It
starts in this step if all of its `seq_lens[b]` tokens are computed in it; its state is then zero, and its row not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._op import Draw

__all__ = ["StateSample", "old_states", "sample_states", "store_states"]


def old_states(state: Tensor, rows: Tensor, query_start_loc: Tensor, seq_lens: Tensor) -> Tensor:
    """Returns the state of each sequence before the step, `[num_seqs, ...]`: zeros for padding and where it starts."""
    goes_on = (rows >= 0) & (seq_lens > query_start_loc.diff())
    old = state[rows.clamp(min=0)]
    return torch.where(goes_on.view(-1, *[1] * (old.dim() - 1)), old, 0.0)


def store_states(state: Tensor, rows: Tensor, new: Tensor) -> None:
    """Writes the state of each sequence, `[num_seqs, ...]`, to its row; that of padding is dropped."""
    is_kept = rows >= 0
    state[rows[is_kept]] = new[is_kept].to(state.dtype)


class StateSample(NamedTuple):
    """The batch of a sample: its number of tokens, a state tensor, and the arguments which say whose rows are whose."""

    num_tokens: int
    state: Tensor
    rows: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor


def sample_states(
    draw: Draw, counts: Sequence[int], computed: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype
) -> StateSample:
    """Draws a batch of sequences and their states. Rows that must not be read hold NaN.

    Args:
        draw: The source of the numbers.
        counts: Number of tokens of each sequence in the step.
        computed: Number of tokens of each sequence before the step; -1 for padding.
        shape: Shape of the state of a sequence.
        dtype: Dtype of the states.
    """
    num_rows = len(counts) + 2
    rows = draw.permutation(num_rows, torch.int32)[: len(counts)]
    known = draw.tensor(computed, torch.int32)
    state = draw.normal(num_rows, *shape, dtype=dtype)
    read = rows[known > 0].long()
    is_read = torch.zeros(num_rows, dtype=torch.bool, device=state.device).index_fill(0, read, True)
    state[~is_read] = torch.nan
    lengths = draw.tensor(counts, torch.int32)
    starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    seq_lens = torch.where(known < 0, 0, known + lengths).int()
    return StateSample(sum(counts), state, torch.where(known < 0, -1, rows).int(), starts, seq_lens)
