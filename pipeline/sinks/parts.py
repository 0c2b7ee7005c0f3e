"""`PartWriter`: makes rows durable in flushes of a few seconds, and joins flushes to parts that fill a file."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ...engine.errors import OutputInUseError
from .. import columns
from ..arrow_values import UNFIT
from ..files.storage import Storage
from ..ledger import row_id
from ..ledger.counts import Counts
from ..ledger.epoch import Epoch
from ..ledger.records import COMMIT, FLUSH, Record, checksum, without_about, write_commit, write_flush
from ..mixed_values import join_exactly
from .format import SinkFormat
from .formats import FORMATS

MAX_PART_BYTES = 256 << 20
"""Memory of the rows of a part, in bytes, from which on the part is closed even if it has few rows."""


@dataclass(frozen=True)
class OutputSpec:
    """Format and place of an output. The spec is pickled and sent to the process that writes.

    Attributes:
        work: The work folder.
        format: Name of the format of the results; dead letters are Parquet.
        schema: Columns and types of the results; None to take them from the rows.
        input_schema: Columns and types of the input; None to take them from the rows.
        is_ordered: Whether the rows of the output have the order of the input.
        max_rows_per_file: Most rows of a file.
        flush_interval_s: Seconds after which a finished row is durable.
    """

    work: Storage
    format: str = "parquet"
    schema: pa.Schema | None = None
    input_schema: pa.Schema | None = None
    is_ordered: bool = False
    max_rows_per_file: int = 50_000
    flush_interval_s: float = 5.0

    def part_format(self, kind: str) -> SinkFormat:
        """Returns the format of parts with results or dead letters. Dead letters and ordered results are Parquet."""
        return FORMATS[self.format if kind == "results" and not self.is_ordered else "parquet"]


Closed = tuple[Record, np.ndarray]
"""The commit of a part, and the sorted ids of its rows."""


@dataclass(slots=True)
class Flushed:
    """A flush whose rows are not yet in a part.

    Attributes:
        name: Name of the flush in the work folder.
        rows: Rows of the flush, with the column `columns.ROW_ID`.
        counts: Counts of these rows.
    """

    name: str
    rows: pa.Table
    counts: Counts


@dataclass(slots=True)
class PartWriter:
    """Writes the flushes and parts of one kind. Calls must not overlap.

    Attributes:
        epoch: The epoch of the process that writes.
        kind: ``"results"`` or ``"failed"``.
        format: Format of the parts.
        max_rows: Most rows of a part.
        flushed: Flushes whose rows are not yet in a part.
    """

    epoch: Epoch
    kind: str
    format: SinkFormat
    max_rows: int
    flushed: list[Flushed] = field(default_factory=list)
    _rows: pa.Table | None = None

    def add(self, rows: pa.Table, counts: Counts) -> list[Closed]:
        """Writes rows as a flush, and closes parts that are full.

        Args:
            rows: Rows with the column `columns.ROW_ID`, at most `max_rows`.
            counts: Counts of these rows.

        Returns:
            The parts that this call has closed.

        Raises:
            OutputInUseError: Another process has begun to write to the work folder, so the flush does not count.
        """
        name = self.epoch.next_name(self.kind) + FLUSH
        write_flush(self.epoch.work, name, rows, counts)
        self._check_epoch()
        return self.take_over(Flushed(name, rows, counts))

    def take_over(self, flushed: Flushed) -> list[Closed]:
        """Puts a flush that is already written into the next part, and returns the parts that this call has closed."""
        joined = self._joined_with(flushed.rows)
        closed = [] if joined is not None else self.close_part()
        self.flushed.append(flushed)
        self._rows = flushed.rows if joined is None else joined
        if sum(one.rows.nbytes for one in self.flushed) >= MAX_PART_BYTES or self._num_rows >= self.max_rows:
            closed += self.close_part()
        return closed

    def close_part(self) -> list[Closed]:
        """Writes a part with the rows of all flushes, sorted by row id, and removes the flushes.

        Returns:
            The part; an empty list if there are no rows.

        Raises:
            OutputInUseError: Another process has begun to write to the work folder. No flush was removed.
        """
        rows = self._rows
        if rows is None:
            return []
        work, name = self.epoch.work, self.epoch.next_name(self.kind)
        ids = row_id.from_arrow(rows[columns.ROW_ID])
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        content = self.format.encode(self._shown(rows.take(pa.array(order))))
        part = f"{name}.{self.format.extension}"
        (work / part).write_bytes(content)
        replaced = tuple(one.name for one in self.flushed)
        first, last = row_id.as_bytes(ids[[0, -1]])
        counts = Counts.sum(flush.counts for flush in self.flushed)
        commit = Record(name + COMMIT, len(ids), counts, part, len(content), replaced, first, last, checksum(content))
        write_commit(work, commit, ids)
        self._check_epoch()
        for flush in replaced:
            (work / flush).remove()
        self.flushed, self._rows = [], None
        return [(commit, ids)]

    def _check_epoch(self) -> None:
        if not self.epoch.is_last():
            raise OutputInUseError(
                f"another run has begun to write to {self.epoch.work.url!r}, and this run has stopped; let one run at "
                "a time write to a folder"
            )

    @property
    def num_rows_left(self) -> int:
        """Number of rows that still fit into the next part."""
        return self.max_rows - self._num_rows

    @property
    def _num_rows(self) -> int:
        return sum(one.rows.num_rows for one in self.flushed)

    def _joined_with(self, rows: pa.Table) -> pa.Table | None:
        """Returns the rows of the next part with further rows, or None if these do not fit into the part."""
        if self._num_rows + rows.num_rows > self.max_rows:
            return None
        try:
            # The types alone do not tell: 2**53 + 1 does not fit a column that also holds fractions.
            return rows if self._rows is None else join_exactly([self._rows, rows], self.format.max_fields)
        except UNFIT:
            return None

    def _shown(self, rows: pa.Table) -> pa.Table:
        """Returns rows as a file holds them: results without ids, dead letters with ids, for when they run again."""
        return without_about(rows if self.kind == "failed" else rows.drop_columns([columns.ROW_ID]))
