"""`LogitEdits`: changes logits before the draw as sampling parameters ask: allowed and bad tokens, biases, penalties.

Each kind of edit has a table on the device (`row_table.py`). The entries of a row of `Tables` are written when a
sequence takes the row. A step edits all its rows at once. The number of operations depends only on shapes, so the host
never waits for a value from the device.
"""

from __future__ import annotations

import sys
from collections import abc
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..device import to_device
from ..sampling_params import SamplingParams
from ..sequence import Sequence
from ..text.spellings import NO_EDGES
from .row_table import RowTable, WordTable

MAX_LOGITS_AT_ONCE = 1 << 24
"""Most logits that are edited together; the temporary tensors of a large batch would take gigabytes."""

NO_EDITS = SamplingParams()


@dataclass(frozen=True, slots=True)
class Lines:
    """Some lines of a step's logits, which are edited together.

    Attributes:
        logits: `[num_lines, vocab_size]` float32.
        row: `[num_lines]`, the row of `Tables` that the sequence of each line has.
        line_of: `[max_num_seqs]`, the line of each row; `num_lines`, where no line is, for rows without one.
        length_of: `[max_num_seqs]`, the number of tokens that the sequence in each row has; 0 for rows without a line.
        tokens: `[max_num_seqs, max_length]`, tokens of prompt and output by row of `Tables`.
    """

    logits: Tensor
    row: Tensor
    line_of: Tensor
    length_of: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, logits: Tensor, row: Tensor, length: Tensor, tokens: Tensor) -> Self:
        """Makes the lines; `length` has the length of the sequence of each line."""
        line_of = row.new_full((len(tokens),), len(logits))
        line_of.scatter_(0, row, torch.arange(len(logits), device=row.device))
        return cls(logits, row, line_of, row.new_zeros(len(tokens)).scatter_(0, row, length), tokens)

    def marked(self, lines: Tensor, ids: Tensor, is_marked: bool) -> Tensor:
        """Returns `[num_lines, vocab_size]` bool: `is_marked` for each pair of a line and a token id, else its inverse.

        Pairs of a line that does not exist mark nothing.
        """
        num_lines, vocab_size = self.logits.shape
        marks = torch.full((num_lines + 1, vocab_size), not is_marked, dtype=torch.bool, device=self.logits.device)
        marks.view(-1).scatter_(0, lines * vocab_size + ids, is_marked)
        return marks[:num_lines]


class LogitEdits:
    """Stores the logit edits (such as biases) of the sequence in each row of `Tables`, and applies them to logits.

    Args:
        max_num_seqs: Number of rows.
        device: Device of the logits.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._device = device
        self._edited_until: dict[int, int] = {}
        self._penalised: set[int] = set()
        # The length of the prompt, and the length below which stop tokens are forbidden.
        self._lengths = torch.zeros((max_num_seqs, 2), dtype=torch.int64, device=device)
        self._penalties = torch.zeros((max_num_seqs, 3), dtype=torch.float32, device=device)
        self._allowed, self._stops = RowTable([torch.int64], device), RowTable([torch.int64], device)
        self._biases = RowTable([torch.int64, torch.float32], device)
        self._bad_words = WordTable(device)

    def set_rows(self, rows: abc.Sequence[int], sequences: abc.Sequence[Sequence]) -> None:
        """Stores the edits of `sequences`, which enter `rows` in the same order; `rows` lose their earlier edits."""
        owners: dict[int, Sequence] = {}
        without: list[int] = []
        self._penalised.difference_update(rows)
        for row, sequence in zip(rows, sequences, strict=True):
            had_edits = self._edited_until.pop(row, None) is not None
            if until := _edited_until(sequence):
                self._edited_until[row] = until
                owners[row] = sequence
                if _has_penalty(sequence.params):
                    self._penalised.add(row)
            elif had_edits:
                without.append(row)
        if owners or without:
            self._set_tables(owners, without)
        if owners:
            self._set_numbers(to_device([*owners], torch.int64, self._device), owners.values())

    def _set_tables(self, owners: Mapping[int, Sequence], without: Iterable[int]) -> None:
        """Replaces the entries of the rows of `owners`, and removes those of the rows `without` edits."""
        params = {**{row: sequence.params for row, sequence in owners.items()}, **dict.fromkeys(without, NO_EDITS)}
        words = {row: sequence.bad_word_edges for row, sequence in owners.items()}
        stops = {row: tuple(sequence.stop_token_ids) for row, sequence in owners.items()}
        biases = {row: p.logit_bias or {} for row, p in params.items()}
        self._allowed.set({row: (p.allowed_token_ids or (),) for row, p in params.items()})
        self._stops.set({row: (stops[row] if p.min_tokens else (),) for row, p in params.items()})
        self._biases.set({row: ([*bias], [*bias.values()]) for row, bias in biases.items()})
        self._bad_words.set({row: words.get(row, NO_EDGES) for row in params})

    def _set_numbers(self, rows: Tensor, sequences: Collection[Sequence]) -> None:
        lengths = [(sequence.num_prompt_tokens, _min_length(sequence)) for sequence in sequences]
        penalties = [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in (r.params for r in sequences)
        ]
        self._lengths[rows] = to_device(lengths, torch.int64, self._device)
        self._penalties[rows] = to_device(penalties, torch.float32, self._device)

    def find(self, rows: abc.Sequence[int], lengths: abc.Sequence[int]) -> list[int]:
        """Returns the indices of the lines of a step's logits that must be edited.

        Args:
            rows: Row of `Tables` that the sequence of each line has.
            lengths: Number of tokens that the sequence of each line has so far.
        """
        if not self._edited_until:
            return []
        until = self._edited_until
        return [i for i, (row, length) in enumerate(zip(rows, lengths, strict=True)) if length < until.get(row, 0)]

    def apply(
        self,
        logits: Tensor,
        edited: abc.Sequence[int],
        rows: abc.Sequence[int],
        lengths: abc.Sequence[int],
        token_table: Tensor,
    ) -> Tensor:
        """Applies the stored masks, biases and penalties to logits, in place.

        Args:
            logits: `[num_lines, vocab_size]` float32, the logits of a step.
            edited: Indices of the lines of `logits` to edit, as `find` returns them; not empty.
            rows: Row of `Tables` that the sequence of each line of `logits` has.
            lengths: Number of tokens that the sequence of each line has so far.
            token_table: `[max_num_seqs, max_model_len]` integers, tokens of prompt and output by row of `Tables`.

        Returns:
            `[num_lines]` bool, true where the edits forbid every token.
        """
        edited_rows, edited_lengths = [rows[i] for i in edited], [lengths[i] for i in edited]
        tokens = token_table[:, : max(edited_lengths)]
        has_penalties = not self._penalised.isdisjoint(edited_rows)
        is_forbidden = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        columns = to_device([edited, edited_rows, edited_lengths], torch.int64, self._device)
        for where, row, length in columns.split(_sequences_at_once(logits, tokens), dim=1):
            lines = Lines.of(logits[where], row, length, tokens)
            self._forbid(lines, edited_rows)
            if self._biases.has(edited_rows):
                self._add_biases(lines)
            if has_penalties:
                self._penalise(lines.logits, row, length.unsqueeze(-1), tokens)
            logits[where] = lines.logits
            is_forbidden[where] = lines.logits.amax(dim=-1).isneginf()
        return is_forbidden

    def _forbid(self, lines: Lines, edited_rows: abc.Sequence[int]) -> None:
        """Sets the logits of forbidden tokens to minus infinity, in place.

        Forbidden are the tokens that are not in `allowed_token_ids`, the last token of a bad word whose other tokens
        were just generated, and stop tokens before `min_tokens`.

        Args:
            lines: The lines to edit.
            edited_rows: The rows of all lines that the step edits.
        """
        if self._stops.has(edited_rows):
            rows, ids = self._stops.rows, self._stops.columns[0]
            too_early = lines.length_of[rows] < self._lengths[rows, 1]
            where = torch.where(too_early, lines.line_of[rows], len(lines.logits))
            lines.logits.masked_fill_(lines.marked(where, ids, True), -torch.inf)
        if self._bad_words.has(edited_rows):
            words = self._bad_words
            where = torch.where(self._ends_bad_word(lines), lines.line_of[words.rows], len(lines.logits))
            lines.logits.masked_fill_(lines.marked(where, words.edges[1], True), -torch.inf)
        if self._allowed.has(edited_rows):
            where = lines.line_of[self._allowed.rows]
            is_limited = where.new_zeros(len(lines.logits) + 1, dtype=torch.bool).scatter_(0, where, True)[:-1, None]
            others = lines.marked(where, self._allowed.columns[0], False)
            lines.logits.masked_fill_(is_limited & others, -torch.inf)

    def _ends_bad_word(self, lines: Lines) -> Tensor:
        """Returns `[num_edges]` bool: whether an edge ends a word whose tokens before it were just generated."""
        words = self._bad_words
        before, token_id, after = words.edges
        length, num_prompt_tokens = lines.length_of[words.rows], self._lengths[words.rows, 0]
        nowhere = len(words.is_start) - 1
        reached = words.is_start
        for back in range(words.depth - 1, 0, -1):
            position = length - back
            follows = (lines.tokens[words.rows, position.clamp(min=0)] == token_id) & (position >= num_prompt_tokens)
            reached = words.is_start.scatter(0, torch.where(follows & reached[before], after, nowhere), True)
        return reached[before] & words.is_last

    def _add_biases(self, lines: Lines) -> None:
        """Adds the biases to the logits, in place."""
        ids, bias = self._biases.columns
        line = lines.line_of[self._biases.rows]
        num_lines, vocab_size = lines.logits.shape
        place = line.clamp(max=num_lines - 1) * vocab_size + ids
        lines.logits.view(-1).scatter_add_(0, place, torch.where(line < num_lines, bias, 0))

    def _penalise(self, logits: Tensor, row: Tensor, length: Tensor, tokens: Tensor) -> None:
        """Applies the penalties to the logits in place.

        Repetition applies to tokens of prompt and output, frequency and presence to output tokens.

        Args:
            logits: `[num_lines, vocab_size]` float32.
            row: `[num_lines]`, the row of `Tables` that the sequence of each line has.
            length: `[num_lines, 1]`, the number of tokens that each sequence has so far.
            tokens: `[max_num_seqs, max_length]`, tokens of prompt and output by row of `Tables`.
        """
        repetition, frequency, presence = self._penalties[row].T.unsqueeze(-1)
        position = torch.arange(tokens.shape[-1], device=row.device)
        is_known = position < length
        is_output = is_known & (position >= self._lengths[row, :1])
        ids = torch.where(is_known, tokens[row], 0).long()
        factor = torch.where(_count(ids, is_known, logits) > 0, repetition, 1)
        logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
        counts = _count(ids, is_output, logits)
        logits.sub_(frequency * counts + torch.where(counts > 0, presence, 0))


def _has_penalty(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def _edited_until(sequence: Sequence) -> int:
    """Returns the length that a sequence must reach before its logits are no longer edited; 0 if they never are."""
    params = sequence.params
    if _has_penalty(params) or params.allowed_token_ids or params.logit_bias or len(sequence.bad_word_edges):
        return sys.maxsize
    return _min_length(sequence) if params.min_tokens else 0


def _min_length(sequence: Sequence) -> int:
    return sequence.num_prompt_tokens + sequence.params.min_tokens


def _sequences_at_once(logits: Tensor, tokens: Tensor) -> int:
    return max(1, MAX_LOGITS_AT_ONCE // max(logits.shape[-1], tokens.shape[-1]))


def _count(ids: Tensor, is_counted: Tensor, logits: Tensor) -> Tensor:
    """Returns, like `logits` in shape and dtype, the count of each token in each row of `ids`, where `is_counted`."""
    return torch.zeros_like(logits).scatter_add_(1, ids, is_counted.to(logits.dtype))
