"""Delta tables as input: the Parquet files of one version of a table, and the values of its partition columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa

from ....engine.errors import ConfigError
from ...files.delta import DELTA_LOG, open_table
from ...files.storage import Storage
from ..base import InputFile, TableFile
from ..format import TableKind

if TYPE_CHECKING:
    from deltalake import DeltaTable

HARMLESS = {"timestampNtz", "vacuumProtocolCheck", "v2Checkpoint", "deletionVectors", "columnMapping"}
"""Features of tables whose files may be read file by file. `_obstacles` checks that the last two are not in use."""

MAPPING = "delta.columnMapping.mode"
FILE_FORMAT = "parquet"


def table_files(place: Storage, version: int | None) -> list[InputFile]:
    """Returns the files of a version of a table, the oldest first, numbered from 0.

    Args:
        place: The table's folder.
        version: The version; None for the newest.

    Raises:
        ConfigError: The table cannot be read, has no file, or has rows that differ from the rows of its files.
    """
    table = open_table(place, version)
    _check_features(place, table)
    schema = pa.schema(table.schema().to_arrow())
    actions = pa.table(table.get_add_actions()).to_pylist()
    if not actions:
        raise ConfigError(f"Delta table {place.url!r} holds no rows at version {table.version()}")
    actions.sort(key=lambda one: (one["modification_time"], one["path"]))
    return [_table_file(ordinal, place, table.version(), schema, one) for ordinal, one in enumerate(actions)]


def _table_file(ordinal: int, place: Storage, version: int, schema: pa.Schema, action: dict[str, Any]) -> InputFile:
    file = _place_of(action["path"], place)
    if_missing = (
        f"Delta table {place.url!r}: version {version} cannot be read: {file.url} is not there; VACUUM removes the "
        "files of old versions"
    )
    partition = _partition(action.get("partition") or {}, schema)
    about = TableFile(place.url, version, schema, partition, FILE_FORMAT, if_missing)
    # A file of a table is never written again, so the time of its writing identifies its content.
    return InputFile(ordinal, file, action["size_bytes"], str(action["modification_time"]), about)


def _partition(values: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Returns one row with the partition columns of a file: the log of the table has their values, the file has not."""
    return pa.Table.from_pylist([values], pa.schema([schema.field(name) for name in values]))


def _place_of(path: str, table: Storage) -> Storage:
    """Returns the place of a file from its path in the log, which is URL-quoted, and may be a URL outside the table."""
    if "://" in path:
        return Storage.at(unquote(path), options=table.options)
    return table / unquote(path)


def _check_features(place: Storage, table: DeltaTable) -> None:
    reason = next(_obstacles(table), None)
    if reason is not None:
        raise ConfigError(f"Delta table {place.url!r} cannot be read file by file: {reason}")


def _obstacles(table: DeltaTable) -> Iterator[str]:
    """Yields the features in use for which the rows of a table may differ from the rows of its files."""
    features = set(table.protocol().reader_features or ())
    if unknown := sorted(features - HARMLESS):
        yield f"it uses {', '.join(unknown)}"
    if table.metadata().configuration.get(MAPPING, "none") != "none":
        yield "its columns have other names in the files (column mapping); pass a copy without that"
    if "deletionVectors" in features and pa.table(table.deletion_vectors().read_all()).num_rows:
        yield "rows of its files are marked as deleted (deletion vectors); first: REORG TABLE ... APPLY (PURGE)"


TABLE = TableKind("Delta table", DELTA_LOG, FILE_FORMAT, table_files)
