"""A Delta table as input: the Parquet files of one version of it, and the values of its partition columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa

from ...engine.errors import ConfigError
from ..files.delta import open_table
from ..files.storage import Storage
from .base import InputFile, TableFile

if TYPE_CHECKING:
    from deltalake import DeltaTable

HARMLESS = {"timestampNtz", "vacuumProtocolCheck", "v2Checkpoint", "deletionVectors", "columnMapping"}
"""Features of tables whose files can be read as they are; of the last two it is looked whether they are made use of."""

MAPPING = "delta.columnMapping.mode"


def table_files(place: Storage, version: int | None) -> list[InputFile]:
    """Returns the files of a version of a table, older ones first, numbered from 0.

    Args:
        place: The table's folder.
        version: The version; None for the newest.

    Raises:
        ConfigError: The table cannot be read, or not file by file, or has no file.
    """
    table = open_table(place, version)
    _check_features(place, table)
    schema = pa.schema(table.schema().to_arrow())
    actions = pa.table(table.get_add_actions()).to_pylist()
    if not actions:
        raise ConfigError(f"Delta table {place.url!r} holds no rows at version {table.version()}")
    actions.sort(key=lambda one: (one["modification_time"], one["path"]))
    partitions = [_partition(one.get("partition") or {}, schema) for one in actions]
    return [
        InputFile(
            ordinal,
            _place_of(one["path"], place),
            one["size_bytes"],
            str(one["modification_time"]),  # A file of a table is never written again.
            TableFile(place.url, table.version(), schema, partition),
        )
        for ordinal, (one, partition) in enumerate(zip(actions, partitions, strict=True))
    ]


def _partition(values: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Returns a table of one row: the columns that are in the log and not in the file."""
    return pa.Table.from_pylist([values], pa.schema([schema.field(name) for name in values]))


def _place_of(path: str, table: Storage) -> Storage:
    """Returns where a file is: its path is that of a URL, from the table's folder unless another table lent it."""
    if "://" in path:
        return Storage.at(unquote(path), options=table.options)
    return table / unquote(path)


def _check_features(place: Storage, table: DeltaTable) -> None:
    reason = next(_obstacles(table), None)
    if reason is not None:
        raise ConfigError(f"Delta table {place.url!r} cannot be read file by file: {reason}")


def _obstacles(table: DeltaTable) -> Iterator[str]:
    """Yields why the files of a table are not its rows."""
    features = set(table.protocol().reader_features or ())
    if unknown := sorted(features - HARMLESS):
        yield f"it uses {', '.join(unknown)}"
    if table.metadata().configuration.get(MAPPING, "none") != "none":
        yield "its columns have other names in the files (column mapping); pass a copy without that"
    if "deletionVectors" in features and pa.table(table.deletion_vectors().read_all()).num_rows:
        yield "rows of its files are marked as deleted (deletion vectors); first: REORG TABLE ... APPLY (PURGE)"
