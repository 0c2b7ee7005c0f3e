"""`ResultWriter`: writes the rows of many blocks to one output, each durable a few seconds after it has finished."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..ledger import row_id
from ..ledger.counts import Counts
from ..ledger.epoch import FAILED, RESULTS, Epoch
from ..ledger.index import RowIndex
from ..ledger.records import read_ids, read_records
from ..stages.base import Row
from .formats import FORMATS
from .parts import OutputSpec, PartWriter
from .tables import Finished, Group, failed_tables, result_tables

MAX_ROWS_PER_FLUSH = 8192


@dataclass(slots=True, eq=False)
class BlockOfRows:
    """The rows of a block that are to run.

    Attributes:
        is_new: Whether each row of the block is to run, bool of shape [num_rows]. The others are done.
        row_ids: Ids of the rows to run.
        num_appended: Number of rows that have finished.
        num_written: Number of rows that are durable.
    """

    is_new: np.ndarray
    row_ids: list[bytes]
    num_appended: int = 0
    num_written: int = 0


class ResultWriter:
    """Writes the rows of all blocks of a process, results and dead letters, each row once.

    Each block has a thread. The thread enters `block`, appends rows as they finish, and leaves when all of them are
    durable, so a call of Ray that returns has lost no row. One more thread writes: after `flush_interval_s`, when
    many rows wait, or when too many blocks wait for their rows to be durable.

    Args:
        spec: Format and place of the output.
        max_blocks: Most blocks at once.
    """

    def __init__(self, spec: OutputSpec, max_blocks: int) -> None:
        self._spec = spec
        self._max_waiting = max(1, max_blocks // 2)
        epoch = Epoch.open(spec.work)
        self._index = RowIndex(read_ids(spec.work, one) for one in read_records(spec.work, epoch.records))
        self._is_first = not epoch.records
        self._parts = {
            kind: PartWriter(epoch, kind, spec.part_format(kind), spec.max_rows_per_file) for kind in (RESULTS, FAILED)
        }
        self._recent: dict[str, set[bytes]] = {RESULTS: set(), FAILED: set()}
        self._lock = threading.Lock()
        self._much_to_write = threading.Condition(self._lock)
        self._written = threading.Condition(self._lock)
        self._released = threading.Condition(self._lock)
        self._blocks: set[BlockOfRows] = set()
        self._claimed: set[bytes] = set()
        self._finished: list[tuple[BlockOfRows, Finished]] = []
        self._counts = Counts()
        self._num_waiting = 0
        self._error: BaseException | None = None
        threading.Thread(target=self._write_on, name="millrace-writer", daemon=True).start()

    @contextmanager
    def block(self, ids: np.ndarray) -> Iterator[BlockOfRows]:
        """Claims the rows of a block. At its end, the context waits until all appended rows are durable.

        Rows that are done are left out, because Ray repeats a call whose answer was lost. Of rows with the same id,
        only the first one runs. If another block has claimed some of the rows, this call first waits until that block
        ends.

        Args:
            ids: Row ids of the block, [num_rows].

        Raises:
            MillraceError: Finished rows cannot be written.
        """
        block = self._claim(ids)
        try:
            yield block
            self._wait_until_written(block)
        finally:
            with self._lock:
                self._blocks.discard(block)
                self._claimed.difference_update(block.row_ids)
                self._released.notify_all()
                self._wake_if_needed()

    def append(self, block: BlockOfRows, row_id: bytes, row: Row, generated: Row) -> None:
        """Queues a row that has passed all stages for writing.

        Args:
            block: The block of the row.
            row_id: Id of the row.
            row: The row; it is a dead letter if it has an error, otherwise a result.
            generated: The row as generation left it, before `postprocess`. This form is counted.
        """
        with self._lock:
            self._finished.append((block, Finished(row_id, row, generated)))
            block.num_appended += 1
            self._wake_if_needed()

    def take_counts(self) -> Counts:
        """Returns the counts of the rows written since the last call of this method, and sets them to zero."""
        with self._lock:
            counts, self._counts = self._counts, Counts()
        return counts

    def _claim(self, ids: np.ndarray) -> BlockOfRows:
        values = row_id.as_bytes(ids)
        with self._lock:
            self._released.wait_for(lambda: self._error is not None or self._claimed.isdisjoint(values))
            self._raise_error()
            is_new = ~self._index.contains(ids)
            known: set[bytes] = set()
            for at, one in enumerate(values):
                is_repeated = any(one in ids for ids in (known, *self._recent.values()))
                # What an earlier process has written may be the same row, which Ray hands in again.
                self._counts.num_left_out += is_repeated or (self._is_first and not is_new[at])
                is_new[at] &= not is_repeated
                known.add(one)
            block = BlockOfRows(is_new, [one for one, new in zip(values, is_new, strict=True) if new])
            self._blocks.add(block)
            self._claimed.update(block.row_ids)
        return block

    def _wait_until_written(self, block: BlockOfRows) -> None:
        with self._lock:
            self._num_waiting += 1
            self._wake_if_needed()
            self._written.wait_for(lambda: self._error is not None or block.num_written == block.num_appended)
            self._num_waiting -= 1
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _must_write(self) -> bool:
        """Returns whether many rows wait to be written, or too many blocks wait for their rows."""
        is_stuck = self._num_waiting >= min(len(self._blocks), self._max_waiting)
        return bool(self._finished) and (is_stuck or len(self._finished) >= MAX_ROWS_PER_FLUSH)

    def _wake_if_needed(self) -> None:
        if self._must_write():
            self._much_to_write.notify()

    def _write_on(self) -> None:
        """Writes finished rows in a loop, which only an error ends. All threads of blocks raise the error."""
        try:
            while True:
                with self._lock:
                    self._much_to_write.wait_for(self._must_write, self._spec.flush_interval_s)
                    finished, self._finished = self._finished, []
                while finished:
                    num_rows = min(MAX_ROWS_PER_FLUSH, self._parts[RESULTS].num_rows_left)
                    self._write(finished[:num_rows])
                    finished = finished[num_rows:]
        except BaseException as error:  # noqa: BLE001  # raised again in the thread of every block
            with self._lock:
                self._error = error
                self._written.notify_all()
                self._released.notify_all()

    def _write(self, finished: Sequence[tuple[BlockOfRows, Finished]]) -> None:
        """Writes rows, and tells their blocks that the rows are durable."""
        started_s = time.monotonic()
        through = [one for _, one in finished if one.row.error is None]
        failed = [one for _, one in finished if one.row.error is not None]
        good, unfit = result_tables(through, self._spec.schema, FORMATS[self._spec.format].max_fields)
        letters = failed_tables([*failed, *unfit], self._spec.input_schema)
        for kind, groups in ((RESULTS, good), (FAILED, letters)):
            for group in groups:
                self._write_group(kind, group)
        with self._lock:
            # While every block waits for this thread, the engines get no new rows.
            if self._num_waiting == len(self._blocks):
                self._counts.blocked_s += time.monotonic() - started_s
            for block, _ in finished:
                block.num_written += 1
            self._written.notify_all()

    def _write_group(self, kind: str, group: Group) -> None:
        rows, table = group
        counts = Counts()
        for one in rows:
            counts.add(_counted(one))
        closed = self._parts[kind].add(table, counts)
        with self._lock:
            self._counts.merge(counts)
            self._recent[kind].update(one.row_id for one in rows)
            for _, ids in closed:
                self._index.add(ids)
                self._recent[kind].difference_update(row_id.as_bytes(ids))


def _counted(one: Finished) -> Row:
    """Returns the form of a row that is counted: the row as generation left it, or the row with a later error."""
    return one.generated if one.row.error is None else one.row
