"""`RowTable` and `WordTable`: numbers of the sequences in the rows of `Tables`, on the device, without padding.

The entries of all rows lie one after the other, so the memory is in proportion to what the requests ask for.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..device import to_device

__all__ = ["RowTable", "WordTable"]


class RowTable:
    """Columns of numbers, with any number of entries for each row of `Tables`.

    Args:
        dtypes: Number type of each column.
        device: Device of the columns.

    Attributes:
        rows: `[num_entries]` int64, the row of each entry.
        columns: The columns, `[num_entries]` each.
    """

    def __init__(self, dtypes: abc.Sequence[torch.dtype], device: torch.device) -> None:
        self._dtypes = dtypes
        self._device = device
        self._entries: dict[int, tuple[np.ndarray, ...]] = {}
        self._send()

    def has(self, rows: Iterable[int]) -> bool:
        """Returns whether one of the rows has an entry."""
        return any(row in self._entries for row in rows)

    def set(self, entries: Mapping[int, tuple[abc.Sequence[float], ...]]) -> None:
        """Replaces the entries of some rows.

        Args:
            entries: Row -> the values of each column, as many in each; no values remove the entries of the row.
        """
        is_changed = False
        for row, columns in entries.items():
            is_changed |= self._entries.pop(row, None) is not None
            if len(columns[0]):
                self._entries[row] = tuple(np.asarray(column) for column in columns)
                is_changed = True
        if is_changed:
            self._send()

    def _send(self) -> None:
        """Copies all entries to the device."""
        counts = [len(columns[0]) for columns in self._entries.values()]
        rows = np.repeat(np.array([*self._entries], dtype=np.int64), counts)
        self.rows: Tensor = to_device(rows, torch.int64, self._device)
        self.columns: list[Tensor] = []
        for i, dtype in enumerate(self._dtypes):
            parts = [columns[i] for columns in self._entries.values()]
            self.columns.append(to_device(np.concatenate(parts) if parts else np.empty(0), dtype, self._device))


class WordTable:
    """The bad words of each row of `Tables`: a word is a list of token ids that must not occur.

    Args:
        device: Device of the tensors.

    Attributes:
        rows: `[num_words]` int64, the row of each word.
        ends: `[num_words]` int64, the last token of each word.
        starts: `[3, num_tokens]` int64, the tokens before the last of all words: index of the word, number of positions
            from the token to the end of the word, token id.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._words: dict[int, abc.Sequence[abc.Sequence[int]]] = {}
        self._send()

    def has(self, rows: Iterable[int]) -> bool:
        """Returns whether one of the rows has a word."""
        return any(row in self._words for row in rows)

    def set(self, words: Mapping[int, abc.Sequence[abc.Sequence[int]]]) -> None:
        """Replaces the words of some rows; an empty list removes those of a row."""
        is_changed = False
        for row, of_row in words.items():
            is_changed |= self._words.pop(row, None) is not None
            if of_row:
                self._words[row] = of_row
                is_changed = True
        if is_changed:
            self._send()

    def _send(self) -> None:
        """Copies all words to the device."""
        rows = [row for row, words in self._words.items() for _ in words]
        words = [word for words in self._words.values() for word in words]
        starts = [
            (index, len(word) - 1 - place, token_id)
            for index, word in enumerate(words)
            for place, token_id in enumerate(word[:-1])
        ]
        as_ids = np.array(starts, dtype=np.int64).reshape(-1, 3).T
        self.rows: Tensor = to_device(np.array(rows, dtype=np.int64), torch.int64, self._device)
        self.ends: Tensor = to_device(np.array([word[-1] for word in words], np.int64), torch.int64, self._device)
        self.starts: Tensor = to_device(np.ascontiguousarray(as_ids), torch.int64, self._device)
