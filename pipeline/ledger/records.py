"""Records: the durable pieces of the output of an unfinished job, each with the ids and the counts of its rows.

A *flush* is one object with the rows that finished within a few seconds, their ids and their counts. A *part* is a file
of the output, and its *commit* is an object beside it with the ids and the counts. A commit names the flushes whose
rows are in the part. From then on these flushes do not count, and they are removed. A part without a commit does not
count.

    results/000002-5eb63bbb-000007.flush      rows, ids, counts
    results/000002-5eb63bbb-000008.parquet    rows
    results/000002-5eb63bbb-000008.ids        ids, counts, and "I replace ...000001.flush to ...000007.flush"

The first number is the number of the writer's epoch (`epoch.py`), the second counts the objects that it wrote; between
them is the beginning of the epoch's token. A record is a file of Arrow, then a checksum of it, its length, and `MARK`.
Versions before 0.1 wrote files of Arrow alone; these are read without a check. The commit has the length and the
checksum of its part.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ...engine.errors import ConfigError, DamagedOutputError
from ...engine.storage.local import refuse_special
from .. import columns
from ..files.storage import Storage
from . import row_id
from .counts import Counts, count_of

FLUSH = ".flush"
COMMIT = ".ids"
MARK = b"MLRCREC1"
"""The end of every record."""
TRAILER = struct.Struct("<16sQ8s")
"""Checksum, length and mark of a record."""
OLD_MARK = b"ARROW1"
"""The end of a record without a trailer."""
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
        checksum: Checksum of the part; empty in a record of an older version.
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
    checksum: str = ""


def checksum(data: bytes | memoryview) -> str:
    """Returns the checksum of the content of a file, as text."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def check_file(file: Storage, num_bytes: int, expected: str) -> None:
    """Checks that a file is as it was written.

    Args:
        file: The file.
        num_bytes: Its size in bytes.
        expected: Its checksum; empty if it is not known.

    Raises:
        DamagedOutputError: The file is missing or was changed.
    """
    try:
        data = file.read_bytes()
    except (FileNotFoundError, IsADirectoryError, ConfigError) as error:
        raise _damaged(file, error) from None
    if len(data) != num_bytes:
        raise DamagedOutputError(damage_message(file, f"has {len(data)} bytes, and was written with {num_bytes}"))
    if expected and checksum(data) != expected:
        raise DamagedOutputError(damage_message(file, "has changed since it was written"))


def check_parts(work: Storage, records: Iterable[Record]) -> None:
    """Checks that the parts of records are there and have their length; `check_file` reads them too, and costs more.

    Raises:
        DamagedOutputError: A part is missing or was cut short.
    """
    parts = {record.part: record.num_bytes for record in records if record.part is not None}
    folders = {name.partition("/")[0] for name in parts}
    sizes = {one.url: one.size for folder in folders for one in work.files.children((work / folder).url)}
    for name, num_bytes in parts.items():
        file = work / name
        if file.url not in sizes:
            raise DamagedOutputError(damage_message(file, "is missing"))
        if sizes[file.url] not in (None, num_bytes):
            wrong = f"has {sizes[file.url]} bytes, and was written with {num_bytes}"
            raise DamagedOutputError(damage_message(file, wrong))


def damage_message(file: Storage, what: str) -> str:
    """Returns the message of an error about a file of a work folder, with what the user can do."""
    return (
        f"{file.url!r} {what}, so nothing was published. Restore the file; or remove it, and the .ids file of the same "
        "name, and resume: its rows run again"
    )


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
        "checksum": record.checksum,
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
    """Reads the record of the given name, which is a flush or a commit, without its rows and ids.

    Raises:
        DamagedOutputError: The record is missing or damaged.
    """
    file = work.inside(name)
    try:
        about = json.loads(pa.ipc.open_file(_content(file)).schema.metadata[ABOUT])
        record = Record(
            name,
            count_of(about["num_rows"]),
            Counts.from_dict(about["counts"]),
            about.get("part"),
            count_of(about.get("num_bytes", 0)),
            tuple(map(str, about.get("replaces", ()))),
            bytes.fromhex(about.get("first", "")),
            bytes.fromhex(about.get("last", "")),
            str(about.get("checksum", "")),
        )
    except DamagedOutputError:
        raise
    except (pa.ArrowException, OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    if record.part is not None:
        work.inside(record.part)
    return record


def read_ids(work: Storage, record: Record) -> np.ndarray:
    """Returns the row ids of a record, [num_rows]. The ids of a commit are sorted."""
    ids = row_id.from_arrow(_read(work / record.name)[columns.ROW_ID])
    if len(ids) != record.num_rows:
        raise DamagedOutputError(damage_message(work / record.name, f"has {len(ids)} ids of {record.num_rows}"))
    return ids


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
    content = sink.getvalue().to_pybytes()
    digest = bytes.fromhex(checksum(content))
    file.write_bytes(content + TRAILER.pack(digest, len(content), MARK))


def _read(file: Storage) -> pa.Table:
    try:
        return pa.ipc.open_file(_content(file)).read_all()
    except (pa.ArrowInvalid, OSError, ConfigError) as error:
        raise _damaged(file, error) from error


def _content(file: Storage) -> pa.Buffer:
    """Returns the file of Arrow in a record, after a check of its length and checksum."""
    if file.is_local:
        refuse_special(file.url)
    whole = pa.memory_map(file.url).read_buffer() if file.is_local else pa.py_buffer(file.read_bytes())
    view = memoryview(whole)
    if bytes(view[-len(OLD_MARK) :]) == OLD_MARK:
        return whole
    if whole.size < TRAILER.size:
        raise DamagedOutputError(damage_message(file, f"has {whole.size} bytes, and was cut short"))
    digest, num_bytes, mark = TRAILER.unpack(view[-TRAILER.size :])
    content = view[: -TRAILER.size]
    if mark != MARK or num_bytes != len(content) or checksum(content) != digest.hex():
        raise DamagedOutputError(damage_message(file, "has changed since it was written"))
    return whole.slice(0, num_bytes)


def _damaged(file: Storage, error: BaseException) -> Exception:
    """Returns the error of a record that cannot be read; a failure of the storage stays what it is."""
    if isinstance(error, FileNotFoundError):
        return DamagedOutputError(damage_message(file, "is missing"))
    if isinstance(error, OSError) and not isinstance(error, IsADirectoryError):
        return error
    return DamagedOutputError(damage_message(file, f"cannot be read ({error})"))
