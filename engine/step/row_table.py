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
from ..text.spellings import END, NO_EDGES, START

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
    """The bad words of each row of `Tables`, as the edges of one graph, see `Speller`.

    Args:
        device: Device of the tensors.

    Attributes:
        rows: `[num_edges]` int64, the row of each edge.
        edges: `[3, num_edges]` int64: the node before a token, the token id, the node after it.
        is_start: `[num_nodes + 1]` bool, true for the nodes where words start. The last node has no edge.
        is_last: `[num_edges]` bool, true for the edges that end a word.
        depth: Largest number of tokens of a spelling.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._words: dict[int, np.ndarray] = {}
        self._send()

    def has(self, rows: Iterable[int]) -> bool:
        """Returns whether one of the rows has a word."""
        return any(row in self._words for row in rows)

    def set(self, words: Mapping[int, np.ndarray]) -> None:
        """Replaces the words of some rows, `[num_edges, 4]` each; no edges remove those of a row."""
        is_changed = False
        for row, of_row in words.items():
            is_changed |= self._words.pop(row, None) is not None
            if len(of_row):
                self._words[row] = of_row
                is_changed = True
        if is_changed:
            self._send()

    def _send(self) -> None:
        """Copies all edges to the device; the nodes of all rows are numbered together."""
        parts = [*self._words.values()]
        num_edges = [len(part) for part in parts]
        starts = np.cumsum([0, *(part[:, [0, 2]].max() + 1 for part in parts)])
        edges = np.concatenate([NO_EDGES, *parts]).T.astype(np.int64)
        is_start = np.zeros(starts[-1] + 1, dtype=bool)
        is_start[starts[:-1] + START] = True
        self.is_last: Tensor = to_device(edges[2] == END, torch.bool, self._device)
        self.depth = int(edges[3].max(initial=0))
        edges[[0, 2]] += np.repeat(starts[:-1], num_edges)
        rows = np.repeat(np.array([*self._words], dtype=np.int64), num_edges)
        self.rows: Tensor = to_device(rows, torch.int64, self._device)
        self.edges: Tensor = to_device(np.ascontiguousarray(edges[:3]), torch.int64, self._device)
        self.is_start: Tensor = to_device(is_start, torch.bool, self._device)
