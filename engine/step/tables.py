"""What stays on the device between steps: the tokens and the KV cache blocks of every running request.

A running request owns a row of both tables from the step it enters until it ends. A step sends what is new and four
numbers per sequence, all in one copy that the host does not wait for; `gather_batch` derives the rest on the device.
A sampled token is written to its row there too, so the next step can start before the host has seen it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from ...kernels import gather_batch
from ..batch import ForwardBatch, GivenEmbeddings
from ..device import to_device
from ..step_plan import StepPlan

PADDING = ((-1,), (0,), (1,))
"""Row, start and count of a sequence of padding."""


@dataclass(frozen=True, slots=True)
class SentPlan:
    """A step's plan on the device.

    Attributes:
        sequences: `[4, num_seqs]` int32, as `gather_batch` takes it, padding included.
        num_shared: `[1]` int32, leading blocks that the decoding sequences have in common.
        sampled: `[3, num_samples]` int32: of each sequence that samples the index of its last token in the step, its
            row, and its length, which is the position of the new token.
    """

    sequences: Tensor
    num_shared: Tensor
    sampled: Tensor


class Tables:
    """The tables of all running requests.

    Args:
        max_num_seqs: Rows.
        max_model_len: Tokens a row can hold.
        block_size: Tokens per KV cache block.
        device: Where they are.
        num_groups: Groups of layers, each of which has a block table.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device, num_groups: int = 1
    ) -> None:
        self.block_size = block_size
        self.max_blocks = -(-max_model_len // block_size)
        self.tokens = torch.zeros((max_num_seqs, max_model_len), dtype=torch.int32, device=device)
        self.blocks = torch.zeros((num_groups, max_num_seqs, self.max_blocks), dtype=torch.int32, device=device)

    def send(self, plan: StepPlan, num_seqs: int) -> SentPlan:
        """Sends a plan: enters new tokens and blocks into the tables, returns the rest.

        Args:
            plan: The step.
            num_seqs: To pad the sequences to.
        """
        tokens = [(new.row, 0, new.sequence.token_ids[: new.num_tokens]) for new in plan.new_rows]
        num_rows = len(self.tokens)
        blocks = [(group * num_rows + row, first, ids) for group, row, first, ids in plan.new_blocks]
        # Tokens of a row that has changed hands come before those of its new owner.
        entries_of = ((self.blocks.flatten(0, 1), blocks), (self.tokens, plan.new_tokens), (self.tokens, tokens))
        changed = [(table, new) for table, new in entries_of if new]
        packed = [*_pack_sequences(plan, num_seqs), np.array([plan.num_shared_blocks])]
        packed += [_pack_entries(new) for _, new in changed]
        sequences, sampled, num_shared, *entries = _send_together(packed, self.tokens.device)
        for (table, _), (row, column, value) in zip(changed, entries, strict=True):
            table[row, column] = value
        return SentPlan(sequences, num_shared, sampled)

    def gather(
        self,
        sequences: Tensor,
        num_tokens: int,
        max_blocks: int,
        num_decodes: int,
        num_shared: Tensor | None,
        given: GivenEmbeddings | None = None,
    ) -> ForwardBatch:
        """Derives the tensors of a step.

        Args:
            sequences: `[4, num_seqs]`, as in `SentPlan`.
            num_tokens: Tokens of all sequences.
            max_blocks: Blocks that the longest of them holds, or more.
            num_decodes: Sequences at the front that compute one token.
            num_shared: As in `SentPlan`; None if it does not pay to know.
            given: Embeddings that are not looked up.
        """
        gathered = [
            gather_batch(self.tokens, blocks, sequences, num_tokens, max_blocks, self.block_size)
            for blocks in self.blocks
        ]
        token_ids, positions, _, query_start_loc, seq_lens, _ = gathered[0]
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slot_mappings=tuple(slot_mapping for _, _, slot_mapping, _, _, _ in gathered),
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_tables=tuple(block_tables for _, _, _, _, _, block_tables in gathered),
            rows=sequences[0],
            num_decodes=num_decodes,
            num_shared=num_shared,
            given=given,
        )

    def append(self, sampled: Tensor, token_ids: Tensor) -> None:
        """Appends the tokens that were sampled, `[num_samples]` int64, one to each row of `SentPlan.sampled`."""
        # A row whose logits hold NaN must still leave a token that exists: a step that is planned ahead reads it.
        self.tokens[sampled[1], sampled[2]] = token_ids.clamp(min=0).int()


def _pack_sequences(plan: StepPlan, num_seqs: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs the sequences of a plan, padded, and those that sample, as `SentPlan` describes them."""
    packed = np.empty((4, num_seqs), dtype=np.int32)
    packed[:3] = PADDING
    packed[:3, : len(plan.rows)] = plan.rows, plan.starts, plan.counts
    rows, starts, counts, _ = packed
    ends = np.cumsum(counts)
    packed[3] = ends - counts
    return packed, np.stack((ends - 1, rows, starts + counts))[:, np.flatnonzero(plan.samples)]


def _pack_entries(entries: Sequence[tuple[int, int, Sequence[int]]]) -> np.ndarray:
    """Turns (row, first column, values) into `[3, num_values]`: row, column and value of each."""
    rows, firsts, values = zip(*entries, strict=True)
    lengths = np.array([len(run) for run in values])
    begins = np.cumsum(lengths) - lengths
    num_values = int(lengths.sum())
    return np.stack(
        (
            np.repeat(rows, lengths),
            np.arange(num_values) + np.repeat(firsts - begins, lengths),
            np.fromiter(chain.from_iterable(values), dtype=np.int64, count=num_values),
        )
    )


def _send_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Sends integer arrays in one copy; returns int32 tensors of their shapes, each at a multiple of 16 bytes."""
    begins = [0, *accumulate(-(-array.size // 4) * 4 for array in arrays)]
    packed = np.zeros(begins.pop(), dtype=np.int32)
    for begin, array in zip(begins, arrays, strict=True):
        packed[begin : begin + array.size] = array.ravel()
    sent = to_device(packed, torch.int32, device)
    return [sent[begin : begin + array.size].view(array.shape) for begin, array in zip(begins, arrays, strict=True)]
