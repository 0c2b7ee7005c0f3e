"""`RowIndex`: the ids of the rows that are done, sorted, in files mapped into memory. A row takes twelve bytes.

The pages belong to the file cache of the system and not to the process, so the system can drop them when memory is
short and read them again. The files have no name, so they vanish with the process, whatever ends it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

import numpy as np

from .row_id import ID_TYPE


class RowIndex:
    """A set of row ids that grows by whole arrays.

    Each array is sorted. Arrays of similar size are joined, so that a set of n ids has at most log2(n) arrays.

    Args:
        ids: Arrays of ids to start with.
    """

    def __init__(self, ids: Iterable[np.ndarray] = ()) -> None:
        self._runs: list[np.ndarray] = []
        self._append(ids)

    def __len__(self) -> int:
        """Returns the number of ids. An id that was added twice counts twice."""
        return sum(len(run) for run in self._runs)

    def add(self, ids: np.ndarray) -> None:
        """Adds an array of ids, which may be in any order, to the set."""
        parts = [ids]
        while self._runs and len(self._runs[-1]) <= 2 * sum(map(len, parts)):
            parts.append(self._runs.pop())
        self._append(parts)

    def sorted_ids(self) -> np.ndarray:
        """Returns all ids, sorted, [num_rows]."""
        if len(self._runs) > 1:
            self._runs = [_mapped(self._runs)]
        return self._runs[0] if self._runs else np.empty(0, ID_TYPE)

    def count_between(self, first: bytes, end: bytes) -> int:
        """Returns the number of ids from `first` to before `end`."""
        ends = np.array([first, end], dtype=ID_TYPE)
        return sum(int(np.diff(np.searchsorted(run, ends))[0]) for run in self._runs)

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Tests for each id whether it is in the set.

        Args:
            ids: Ids of shape [num_rows].

        Returns:
            Whether each id is in the set, bool of shape [num_rows].
        """
        found = np.zeros(len(ids), dtype=bool)
        for run in self._runs:
            at = np.searchsorted(run, ids)
            at[at == len(run)] = 0
            found |= run[at] == ids
        return found

    def _append(self, parts: Iterable[np.ndarray]) -> None:
        if len(run := _mapped(parts)):
            self._runs.append(run)


def _mapped(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Returns all ids of the arrays in one sorted array, which a memory-mapped temporary file holds."""
    with tempfile.TemporaryFile() as file:
        for part in parts:
            file.write(np.ascontiguousarray(part).view(np.uint8).data)
        num_rows = file.tell() // ID_TYPE.itemsize
        if not num_rows:
            return np.empty(0, ID_TYPE)
        file.flush()
        run = np.memmap(file, dtype=ID_TYPE, mode="r+", shape=(num_rows,))
    run.sort()
    return run
