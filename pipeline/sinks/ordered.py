"""Files in the order of the input, written one after the other from the rows of all parts.

The sorted ids of all rows say which rows a file has. Each part is sorted as well, so its share of a file is one range
of rows, and only the row groups of that range are read. Memory holds the rows of one file, and twelve bytes a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..arrow_values import join
from ..files.storage import Storage
from ..ledger import row_id
from ..ledger.counts import Counts
from ..ledger.epoch import RESULTS, Epoch
from ..ledger.index import RowIndex
from ..ledger.records import Record, checksum, read_ids
from .formats import FORMATS
from .parts import OutputSpec


def order_parts(epoch: Epoch, parts: Sequence[Record], spec: OutputSpec) -> list[Record]:
    """Writes the rows of all parts into files, in the order of their ids.

    Args:
        epoch: The epoch of the process that writes.
        parts: Commits of parts in Parquet.
        spec: Format and place of the output.

    Returns:
        A record of each file. The records are not stored as commits, so the parts stay valid until the files are
        published. The first record has the counts of all files, the others have none.
    """
    format = FORMATS[spec.format]
    everything = RowIndex(read_ids(epoch.work, part) for part in parts).sorted_ids()
    written: list[Record] = []
    for start in range(0, len(everything), spec.max_rows_per_file):
        ids = everything[start : start + spec.max_rows_per_file]
        file = f"{epoch.next_name(RESULTS)}-ordered.{format.extension}"
        content = format.encode(_rows_between(epoch.work, parts, ids[[0, -1]]))
        (epoch.work / file).write_bytes(content)
        # Only the sum of the counts of all files is read later.
        counts = Counts() if written else Counts.sum(part.counts for part in parts)
        written.append(Record(file, len(ids), counts, file, len(content), checksum=checksum(content)))
    return written


def _rows_between(work: Storage, parts: Sequence[Record], ends: np.ndarray) -> pa.Table:
    """Returns the rows whose ids are from the first to the last of `ends`, sorted by id."""
    least, greatest = row_id.as_bytes(ends)
    rows, ids = [], []
    for part in parts:
        if part.last < least or part.first > greatest:
            continue
        own = read_ids(work, part)
        first, last = np.searchsorted(own, ends[:1], "left")[0], np.searchsorted(own, ends[1:], "right")[0]
        if first < last:
            assert part.part is not None
            rows.append(_read_rows(work / part.part, int(first), int(last)))
            ids.append(own[first:last])
    order = np.argsort(np.concatenate(ids), kind="stable")
    return join(rows).take(pa.array(order))


def _read_rows(file: Storage, first: int, last: int) -> pa.Table:
    """Reads the rows of a Parquet file from `first` to before `last`."""
    with file.open_arrow() as opened:
        parquet = pq.ParquetFile(opened)
        sizes = [parquet.metadata.row_group(at).num_rows for at in range(parquet.num_row_groups)]
        ends = np.cumsum(sizes)
        groups = [at for at in range(len(sizes)) if ends[at] > first and ends[at] - sizes[at] < last]
        skipped = int(ends[groups[0]] - sizes[groups[0]])
        return parquet.read_row_groups(groups).slice(first - skipped, last - first)
