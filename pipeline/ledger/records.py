"""Records: the durable pieces of the output of an unfinished job, each with the ids and the counts of its rows.

A *flush* is one object with the rows that finished within a few seconds, their ids and their counts. A *part* is a file
of the output, and its *commit* is an object beside it with the ids and the counts. A commit names the flushes whose
rows are in the part. From then on these flushes do not count, and they are removed. A part without a commit does not
count.

    results/000002-000007.flush          rows, ids, counts
    results/000002-000008.parquet        rows
    results/000002-000008.ids            ids, counts, and "I replace 000002-000001.flush to 000002-000007.flush"

The first number is the number of the writer's epoch (`epoch.py`), the second counts the objects that it wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .. import columns
from ..files.storage import Storage
from . import row_id
from .counts import Counts

FLUSH = ".flush"
COMMIT = ".ids"
READERS = 16
"""Number of records that are read at once."""

ABOUT = b"millrace"
"""Key in the metadata of a record's schema. Its value is JSON with the fields of `Record`."""


@dataclass(frozen=True, slots=True)
class Record:
    """A flush, or the commit of a part. The ids stay in storage until `read_ids` reads them.

    Attributes:
        name: Name of the record in the work folder.
        num_rows: Number of rows.
        counts: Counts of the rows.
        part: Name of the part in the work folder; None for a flush.
        num_bytes: Size of the part.
        replaces: Names of the flushes whose rows are in the part.
        first: The least id of a part.
        last: The greatest id of a part.
    """

    name: str
    num_rows: int
    counts: Counts
    part: str | None = None
    num_bytes: int = 0
    replaces: tuple[str, ...] = ()
    first: bytes = b""
    last: bytes = b""


def write_flush(work: Storage, name: str, rows: pa.Table, counts: Counts) -> None:
    """Writes a flush: an Arrow file of rows whose schema metadata holds the counts.

    Args:
        work: Work folder.
        name: Name of the flush.
        rows: Rows, with the column `columns.ROW_ID`.
        counts: Counts of these rows.
    """
    _write(work / name, rows, {"counts": counts.as_dict(), "num_rows": rows.num_rows})


def write_commit(work: Storage, record: Record, ids: np.ndarray) -> None:
    """Writes the commit of a part: an Arrow file of the row ids, with the rest of the record in the schema metadata.

    The part must exist already.

    Args:
        work: Work folder.
        record: The commit.
        ids: The sorted row ids of the part.
    """
    about = {
        "num_rows": record.num_rows,
        "counts": record.counts.as_dict(),
        "part": record.part,
        "num_bytes": record.num_bytes,
        "replaces": record.replaces,
        "first": record.first.hex(),
        "last": record.last.hex(),
    }
    _write(work / record.name, pa.table({columns.ROW_ID: row_id.to_arrow(ids)}), about)


def read_records(work: Storage, names: Iterable[str]) -> list[Record]:
    """Reads records, and skips the flushes that a commit replaces.

    Args:
        work: Work folder.
        names: Names of flushes and commits.

    Returns:
        Records in the order of their names.
    """
    given = sorted(names)
    with ThreadPoolExecutor(READERS) as readers:  # In a bucket, a record takes a request or two.
        commits = list(readers.map(lambda name: read_record(work, name), _ending(given, COMMIT)))
        replaced = {name for commit in commits for name in commit.replaces}
        live = [name for name in _ending(given, FLUSH) if name not in replaced]
        flushes = list(readers.map(lambda name: read_record(work, name), live))
    return sorted([*commits, *flushes], key=lambda record: record.name)


def read_record(work: Storage, name: str) -> Record:
    """Reads the record of the given name, which is a flush or a commit, without its rows and ids."""
    with (work / name).open_arrow() as opened:
        about = json.loads(pa.ipc.open_file(opened).schema.metadata[ABOUT])
    return Record(
        name,
        about["num_rows"],
        Counts.from_dict(about["counts"]),
        about.get("part"),
        about.get("num_bytes", 0),
        tuple(about.get("replaces", ())),
        bytes.fromhex(about.get("first", "")),
        bytes.fromhex(about.get("last", "")),
    )


def read_ids(work: Storage, record: Record) -> np.ndarray:
    """Returns the row ids of a record, [num_rows]. The ids of a commit are sorted."""
    return row_id.from_arrow(_read(work / record.name)[columns.ROW_ID])


def read_flush_rows(work: Storage, name: str) -> pa.Table:
    """Returns the rows of a flush, with the column `columns.ROW_ID`."""
    return without_about(_read(work / name))


def without_about(rows: pa.Table) -> pa.Table:
    """Returns a table without the entry that `write_flush` added to the schema metadata."""
    kept = {key: value for key, value in (rows.schema.metadata or {}).items() if key != ABOUT}
    return rows.replace_schema_metadata(kept or None)


def _ending(names: Iterable[str], suffix: str) -> list[str]:
    return [name for name in names if name.endswith(suffix)]


def _write(file: Storage, table: pa.Table, about: dict[str, object]) -> None:
    metadata = {**(table.schema.metadata or {}), ABOUT: json.dumps(about)}
    table = table.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    file.write_bytes(sink.getvalue().to_pybytes())


def _read(file: Storage) -> pa.Table:
    if file.is_local:
        return pa.ipc.open_file(pa.memory_map(file.url)).read_all()
    return pa.ipc.open_file(pa.py_buffer(file.read_bytes())).read_all()
