"""`LogitEdits`: changes logits before the draw as sampling parameters ask: allowed and bad tokens, biases, penalties.

Each kind of edit has a table on the device with one line for each row of `Tables`. The line is written when a sequence
takes the row. A step edits all its rows at once. The number of operations depends only on shapes, so the host never
waits for a value from the device.
"""

from __future__ import annotations

import itertools
import sys
from collections import abc
from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..device import to_device
from ..sampling_params import SamplingParams
from ..sequence import Sequence

MAX_LOGITS_AT_ONCE = 1 << 24
"""Most logits that are edited together; the temporary tensors of a large batch would take gigabytes."""

NO_TOKEN = -1
"""Padding of a line that has fewer token ids than its table is wide."""

Numbers = npt.NDArray[np.int64] | npt.NDArray[np.float64]


class RowTable:
    """A tensor with one array of numbers for each row of `Tables`; the arrays are padded to a common shape.

    Args:
        num_rows: Number of rows.
        num_dims: Number of dimensions of the array of one row.
        padding: Number with which the arrays are padded.
        dtype: Number type of the table.
        device: Device of the table.

    Attributes:
        lines: `[num_rows, ...]`, the arrays; the sizes after the first start at 0 and grow with the largest array.
    """

    def __init__(self, num_rows: int, num_dims: int, padding: int, dtype: torch.dtype, device: torch.device) -> None:
        self._padding = padding
        self.lines = torch.empty((num_rows, *[0] * num_dims), dtype=dtype, device=device)

    def set(self, rows: Tensor, arrays: Collection[Numbers]) -> None:
        """Replaces the arrays of some rows.

        Args:
            rows: `[num_changed]` int64, on the device: the rows whose arrays are replaced.
            arrays: New array of each row in `rows`, in order.
        """
        sizes = self.lines.shape[1:]
        new_sizes = [max(lengths) for lengths in zip(sizes, *(array.shape for array in arrays), strict=True)]
        growth = [(0, new - old) for old, new in zip(sizes, new_sizes, strict=True)]
        if any(map(any, growth)):
            last_first = list(itertools.chain(*reversed(growth)))
            self.lines = torch.nn.functional.pad(self.lines, last_first, value=self._padding)
        staged = np.full((len(arrays), *new_sizes), self._padding, dtype=np.result_type(*arrays))
        for line, array in zip(staged, arrays, strict=True):
            line[tuple(map(slice, array.shape))] = array
        if staged.size:
            self.lines[rows] = to_device(staged, self.lines.dtype, self.lines.device)


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

        def ids(num_dims: int = 1) -> RowTable:
            return RowTable(max_num_seqs, num_dims, NO_TOKEN, torch.int64, device)

        def numbers() -> RowTable:
            return RowTable(max_num_seqs, 1, 0, torch.float32, device)

        self._lengths = ids()  # length of the prompt, and length below which stop tokens are forbidden
        self._allowed, self._stops = ids(), ids()
        self._bad_words = ids(num_dims=2)  # each word from its last token to its first
        self._biased, self._bias = ids(), numbers()
        self._penalties = numbers()  # repetition, frequency, presence

    def set_rows(self, rows: abc.Sequence[int], sequences: abc.Sequence[Sequence]) -> None:
        """Stores the edits of `sequences`, which enter `rows` in the same order; `rows` lose their earlier edits."""
        owners = {}
        self._penalised.difference_update(rows)
        for row, sequence in zip(rows, sequences, strict=True):
            self._edited_until.pop(row, None)
            if until := _edited_until(sequence):
                self._edited_until[row] = until
                owners[row] = sequence
                if _has_penalty(sequence.params):
                    self._penalised.add(row)
        if owners:
            self._set_tables(to_device(list(owners), torch.int64, self._device), owners.values())

    def _set_tables(self, rows: Tensor, sequences: Collection[Sequence]) -> None:
        params = [sequence.params for sequence in sequences]
        self._lengths.set(rows, [_ids((r.num_prompt_tokens, _min_length(r))) for r in sequences])
        self._allowed.set(rows, [_ids(p.allowed_token_ids or ()) for p in params])
        self._stops.set(rows, [_ids(r.stop_token_ids if r.params.min_tokens else ()) for r in sequences])
        self._bad_words.set(rows, [_reversed_words(r.bad_word_ids) for r in sequences])
        self._biased.set(rows, [_ids(p.logit_bias or ()) for p in params])
        self._bias.set(rows, [np.array([*(p.logit_bias or {}).values()], dtype=np.float64) for p in params])
        penalties = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
        self._penalties.set(rows, [np.array(numbers) for numbers in penalties])

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
            part = logits[where]
            self._forbid(part, row, length.unsqueeze(-1), tokens)
            if self._biased.lines.shape[-1]:
                part.scatter_add_(1, self._biased.lines[row].clamp(min=0), self._bias.lines[row])
            if has_penalties:
                self._penalise(part, row, length.unsqueeze(-1), tokens)
            logits[where] = part
            is_forbidden[where] = part.amax(dim=-1).isneginf()
        return is_forbidden

    def _forbid(self, logits: Tensor, row: Tensor, length: Tensor, tokens: Tensor) -> None:
        """Sets the logits of forbidden tokens to minus infinity, in place.

        Forbidden are the tokens that are not in `allowed_token_ids`, the last token of a bad word whose other tokens
        were just generated, and stop tokens before `min_tokens`.

        Args:
            logits: `[num_lines, vocab_size]` float32.
            row: `[num_lines]`, the row of `Tables` that the sequence of each line has.
            length: `[num_lines, 1]`, the number of tokens that each sequence has so far.
            tokens: `[max_num_seqs, max_length]`, tokens of prompt and output by row of `Tables`.
        """
        allowed, vocab_size = self._allowed.lines[row], logits.shape[-1]
        too_early = length < self._lengths.lines[row, 1:2]
        forbidden = [torch.where(too_early, self._stops.lines[row], NO_TOKEN)]
        if self._bad_words.lines.numel():
            forbidden.append(self._ends_of_bad_words(row, length, tokens))
        ids = torch.cat(forbidden, dim=-1)
        if ids.shape[-1]:
            logits.masked_fill_(_mark(ids, vocab_size), -torch.inf)
        if allowed.shape[-1]:
            has_allowed = allowed[:, :1] != NO_TOKEN
            logits.masked_fill_(has_allowed & ~_mark(allowed, vocab_size), -torch.inf)

    def _ends_of_bad_words(self, row: Tensor, length: Tensor, tokens: Tensor) -> Tensor:
        """Returns `[num_lines, num_words]`: a bad word's last token if the others were just drawn, or `NO_TOKEN`."""
        words = self._bad_words.lines[row]
        back = torch.arange(1, words.shape[-1], device=row.device)
        recent = tokens[row.unsqueeze(-1), (length - back).clamp(min=0)]
        is_output = length - back >= self._lengths.lines[row, :1]
        # The padding in front of a short word matches any token.
        matches = (words[:, :, 1:] == recent.unsqueeze(1)) & is_output.unsqueeze(1) | (words[:, :, 1:] == NO_TOKEN)
        return torch.where(matches.all(dim=-1), words[:, :, 0], NO_TOKEN)

    def _penalise(self, logits: Tensor, row: Tensor, length: Tensor, tokens: Tensor) -> None:
        """Applies the penalties to the logits in place; takes the arguments of `_forbid`.

        Repetition applies to tokens of prompt and output, frequency and presence to output tokens.
        """
        repetition, frequency, presence = self._penalties.lines[row].T.unsqueeze(-1)
        position = torch.arange(tokens.shape[-1], device=row.device)
        is_known = position < length
        is_output = is_known & (position >= self._lengths.lines[row, :1])
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
    if _has_penalty(params) or params.allowed_token_ids or params.logit_bias or sequence.bad_word_ids:
        return sys.maxsize
    return _min_length(sequence) if params.min_tokens else 0


def _min_length(sequence: Sequence) -> int:
    return sequence.num_prompt_tokens + sequence.params.min_tokens


def _ids(values: Iterable[int]) -> Numbers:
    return np.array([*values], dtype=np.int64)


def _reversed_words(words: abc.Sequence[abc.Sequence[int]]) -> Numbers:
    """Returns `[num_words, longest]`, the words with their tokens reversed, so that padding lies in front of a word."""
    lines = np.full((len(words), max(map(len, words), default=0)), NO_TOKEN)
    for line, word in zip(lines, words, strict=True):
        line[: len(word)] = word[::-1]
    return lines


def _sequences_at_once(logits: Tensor, tokens: Tensor) -> int:
    return max(1, MAX_LOGITS_AT_ONCE // max(logits.shape[-1], tokens.shape[-1]))


def _mark(ids: Tensor, vocab_size: int) -> Tensor:
    """Returns `[num_rows, vocab_size]` bool, true for the tokens whose ids are in the same row of `ids`."""
    marks = torch.zeros((len(ids), 1 + vocab_size), dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, ids - NO_TOKEN, True)[:, 1:]  # column 0 belongs to the padding


def _count(ids: Tensor, is_counted: Tensor, logits: Tensor) -> Tensor:
    """Returns, like `logits` in shape and dtype, the count of each token in each row of `ids`, where `is_counted`."""
    return torch.zeros_like(logits).scatter_add_(1, ids, is_counted.to(logits.dtype))
