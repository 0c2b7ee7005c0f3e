"""`Tables`: the tokens and KV cache blocks of all running sequences, which stay on the device between steps.

A running sequence owns a row of every table from the step in which it enters until it ends. A step sends only new
tokens and blocks and four numbers per sequence, in one copy for which the host does not wait; `gather_batch` derives
the rest on the device. A sampled token is also written to its row on the device, so the next step can start before the
host has read the token.
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
from ..lora.routing import NO_SLOT
from ..step_plan import StepPlan

PADDING = ((-1,), (0,), (1,))
"""Row, start and count of a padding sequence."""


def padding_plan(num_seqs: int, device: torch.device) -> Tensor:
    """Returns a plan `[4, num_seqs]` int32 (see `SentPlan.sequences`) of padding sequences alone."""
    return torch.from_numpy(_pack_sequences(StepPlan(), num_seqs)[0]).to(device)


@dataclass(frozen=True, slots=True)
class SentPlan:
    """A step plan on the device.

    Attributes:
        sequences: `[4, num_seqs]` int32, the `plan` argument of `kernels.gather_batch`, padding included.
        num_shared: `[1]` int32, number of leading blocks that the decoding sequences share.
        sampled: `[3, num_samples]` int32: for each sequence that samples, the index of its last token in the step, its
            row in the tables, and its length, which is the position of the new token.
    """

    sequences: Tensor
    num_shared: Tensor
    sampled: Tensor


class Tables:
    """Two tables on the device with a row for each running sequence: token ids, and KV cache block ids by group.

    Args:
        max_num_seqs: Number of rows.
        max_model_len: Most tokens of a row.
        block_size: Tokens per KV cache block.
        device: Device of the tables.
        num_groups: Number of groups of layers, each of which has a block table.

    Attributes:
        adapter_slots: `[max_num_seqs]`, on the host: the adapter slot of each row's sequence; `NO_SLOT` for none.
        num_first_tokens: `[max_num_seqs]`, on the host: the number of leading tokens of type 0 of each row's sequence;
            `max_model_len` if it has no others.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device, num_groups: int = 1
    ) -> None:
        self.block_size = block_size
        self.max_blocks = -(-max_model_len // block_size)
        self.tokens = torch.zeros((max_num_seqs, max_model_len), dtype=torch.int32, device=device)
        self.blocks = torch.zeros((num_groups, max_num_seqs, self.max_blocks), dtype=torch.int32, device=device)
        self.adapter_slots = np.full(max_num_seqs, NO_SLOT)
        self.num_first_tokens = np.full(max_num_seqs, max_model_len)
        # Views of `blocks`, made once because every step needs them.
        self._blocks_of_groups = self.blocks.unbind()
        self._blocks_of_rows = self.blocks.flatten(0, 1)

    def send(self, plan: StepPlan, num_seqs: int) -> SentPlan:
        """Sends a plan to the device, writes its new tokens and blocks to the tables, and returns its other numbers.

        Args:
            plan: The step plan.
            num_seqs: Number of sequences to which the plan is padded.
        """
        tokens = [(new.row, 0, new.sequence.token_ids[: new.num_tokens]) for new in plan.new_rows]
        num_rows = len(self.tokens)
        blocks = [(group * num_rows + row, first, ids) for group, row, first, ids in plan.new_blocks]
        # A new token may belong to the previous owner of a row, so the tokens of new owners are written last.
        entries_of = ((self._blocks_of_rows, blocks), (self.tokens, plan.new_tokens), (self.tokens, tokens))
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
        """Returns the tensors that a model takes for a step, computed on the device from the plan and the tables.

        Args:
            sequences: `[4, num_seqs]`, as in `SentPlan`.
            num_tokens: Number of tokens that the step computes.
            max_blocks: Number of columns of the block tables: blocks of the longest sequence, or more.
            num_decodes: Number of sequences, all at the front, that compute one token.
            num_shared: As in `SentPlan`; None if attention reads the blocks of each sequence separately.
            given: Embeddings that prompts give in place of those that the model looks up; None if there are none.
        """
        gathered = [
            gather_batch(self.tokens, blocks, sequences, num_tokens, max_blocks, self.block_size)
            for blocks in self._blocks_of_groups
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

    def token_types(self, plan: StepPlan) -> Tensor | None:
        """Returns the type of each token of a step of whole texts, `[num_tokens]` int64; None if all have type 0."""
        for new in plan.new_rows:
            first = new.sequence.num_first_tokens
            self.num_first_tokens[new.row] = self.tokens.shape[1] if first is None else first
        counts = np.array(plan.counts)
        num_first = np.minimum(self.num_first_tokens[plan.rows], counts)
        if (num_first == counts).all():
            return None
        lengths = np.stack((num_first, counts - num_first), axis=1).ravel()
        return to_device(np.tile((0, 1), len(counts)).repeat(lengths), torch.int64, self.tokens.device)

    def append(self, sampled: Tensor, token_ids: Tensor) -> None:
        """Writes `token_ids` `[num_samples]` int64 to the rows and positions in `sampled` (see `SentPlan`)."""
        # A negative id says that no token could be drawn. The next step may be planned already and then reads the
        # token, so the table must hold an id that exists.
        self.tokens[sampled[1], sampled[2]] = token_ids.clamp(min=0).int()

    def append_all(self, sequences: Tensor, token_ids: Tensor) -> None:
        """Writes `token_ids` `[num_seqs]` int64 behind the tokens of `sequences` (see `SentPlan`), padding included."""
        rows, columns = self.ends(sequences)
        is_padding = sequences[0] < 0
        # Padding writes the first token of row 0 over itself: every sequence has one, and nothing is appended there.
        columns = columns.masked_fill(is_padding, 0)
        new = torch.where(is_padding, self.tokens[rows, columns], token_ids.clamp(min=0).int())
        self.tokens[rows, columns] = new

    def ends(self, sequences: Tensor) -> Tensor:
        """Returns row and length of `sequences` (see `SentPlan`) after the step, `[2, num_seqs]` int64.

        Padding gets a row that exists, number 0.
        """
        rows, starts, counts, _ = sequences.long().unbind()
        return torch.stack((rows.clamp(min=0), starts + counts))


def _pack_sequences(plan: StepPlan, num_seqs: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fields `sequences`, padded to `num_seqs`, and `sampled` of a `SentPlan` as arrays."""
    packed = np.empty((4, num_seqs), dtype=np.int32)
    num_planned = len(plan.rows)
    packed[:3, :num_planned] = plan.rows, plan.starts, plan.counts
    packed[:3, num_planned:] = PADDING
    rows, starts, counts, _ = packed
    ends = np.cumsum(counts)
    packed[3] = ends - counts
    return packed, np.stack((ends - 1, rows, starts + counts))[:, np.flatnonzero(plan.samples)]


def _pack_entries(entries: Sequence[tuple[int, int, Sequence[int]]]) -> np.ndarray:
    """Turns entries (row, first column, values) into an array `[3, num_values]`: row, column and value."""
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
    """Sends integer arrays in one copy; returns int32 tensors of the same shapes, each aligned to 16 bytes."""
    begins = [0, *accumulate(-(-array.size // 4) * 4 for array in arrays)]
    packed = np.zeros(begins.pop(), dtype=np.int32)
    for begin, array in zip(begins, arrays, strict=True):
        packed[begin : begin + array.size] = array.ravel()
    sent = to_device(packed, torch.int32, device)
    return [sent[begin : begin + array.size].view(array.shape) for begin, array in zip(begins, arrays, strict=True)]
