"""Output as Delta tables: Parquet files that a commit to the table's log makes visible, all in one version.

A commit is written down before it is made (`TableCommit`, in the plan of `publish`). The log stores its token as the
identifier of a transaction. A run that finds the plan after a death looks for the token in the log, which says whether
the commit was made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ....engine.errors import ConfigError, StorageError
from ...files.delta import DELTA_LOG, is_table, one_line, open_table, require_delta, storage_options
from ...files.storage import Storage
from ..format import SinkFormat
from ..publisher import Publisher
from .parquet import encode

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from deltalake.transaction import AddAction

WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20),
    pa.float16(): pa.float32(),
    pa.null(): pa.string(),
}
"""Type that a Delta table does not have -> a type that holds all of its values."""


@dataclass(frozen=True, slots=True)
class TableCommit:
    """The description of a new version of a table, as plain data for a plan in JSON.

    Attributes:
        token: Text that no other commit has.
        replaces: Whether the files are the whole content of the table; otherwise they are added to it.
        schema: Columns and types, in the form of a table's log.
        files: Name, number of rows and size of each file, as a manifest has them.
    """

    token: str
    replaces: bool
    schema: str
    files: Sequence[dict[str, Any]]


class DeltaPublisher(Publisher):
    """A publisher that makes files visible by one commit to the log of a Delta table."""

    log_names = (DELTA_LOG,)

    def file_suffix(self, token: str) -> str:
        """Returns a suffix that makes every file name new: older versions of the table still refer to older files."""
        return f"-{token}"

    def plan_commit(
        self, token: str, schema: pa.Schema | None, files: Sequence[dict[str, Any]], *, replaces: bool
    ) -> dict[str, Any] | None:
        """Returns a `TableCommit` of these files as a dict, which `commit` takes; see `Publisher.plan_commit`."""
        assert schema is not None
        return asdict(TableCommit(token, replaces, schema_text(schema), files))

    def commit(self, output: Storage, planned: dict[str, Any] | None) -> int | None:
        """Commits the version that a `TableCommit` describes, unless it exists, and returns its number."""
        assert planned is not None
        return commit(output, TableCommit(**planned))

    def kept_names(self, output: Storage) -> set[str]:
        """Returns the log and the Parquet files of a table, which stay readable as older versions."""
        if not is_table(output):
            return set()
        return {DELTA_LOG, *(file.name for file in output.list(".parquet"))}


def table_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type with which a Delta table stores a column of the given type.

    Raises:
        ValueError: A Delta table has no type for the column.
    """
    from deltalake import Schema

    kind = _widened(kind)
    if pa.types.is_timestamp(kind):
        kind = pa.timestamp("us", None if kind.tz is None else "UTC")
    try:
        return pa.schema(Schema.from_arrow(pa.schema([("value", kind)])).to_arrow()).field(0).type
    except Exception as error:  # The library raises bare exceptions.
        raise ValueError(f"a Delta table has no type for {kind}") from error


def _widened(kind: pa.DataType) -> pa.DataType:
    """Returns a type that a Delta table has and that holds the same values; also in lists, such as vectors."""
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_widened(kind.value_type))
    return WIDER.get(kind, kind)


def check_schema(schema: pa.Schema) -> None:
    """Checks that a table can have columns together, whose names differ in more than capitals.

    Raises:
        ConfigError: It cannot.
    """
    try:
        schema_text(schema)
    except Exception as error:  # The library raises bare exceptions.
        raise ConfigError(
            f"a Delta table cannot have these columns together: {one_line(error)}; choose others with columns, or "
            "another output_column"
        ) from error


def schema_text(schema: pa.Schema) -> str:
    """Returns a schema as the JSON text with which the log of a Delta table describes it."""
    from deltalake import Schema

    return Schema.from_arrow(pa.schema([(field.name, field.type) for field in schema])).to_json()


def commit(table: Storage, planned: TableCommit) -> int:
    """Makes files the content of a Delta table, or adds them to it, by a commit, unless the commit was made before.

    If the files are the whole content, a table that does not exist is created.

    Args:
        table: The table's folder, which holds the files.
        planned: The content of the version.

    Returns:
        The number of the version.

    Raises:
        ConfigError: The table to add files to does not exist, or the package `deltalake` is not installed.
        StorageError: The commit failed, and readers see nothing of it.
    """
    app_id = f"millrace-{planned.token}"
    found = open_table(table) if is_table(table) or not planned.replaces else None
    if found is None or found.transaction_version(app_id) is None:
        try:
            _write(table, found, planned, app_id)
        except Exception as error:  # The library raises bare exceptions too, and OSError.
            raise StorageError(f"cannot commit to the Delta table {table.url!r}: {one_line(error)}") from error
        found = open_table(table)
    return _version_of(table, found.version(), app_id)


def _write(place: Storage, table: DeltaTable | None, planned: TableCommit, app_id: str) -> None:
    from deltalake import CommitProperties, Schema, Transaction
    from deltalake.transaction import create_table_with_add_actions

    properties = CommitProperties(app_transactions=[Transaction(app_id, 0)])
    schema, added = Schema.from_json(planned.schema), [_added(file) for file in planned.files]
    if table is not None and not planned.replaces:
        table.create_write_transaction(list(added), "append", schema, commit_properties=properties)
        return
    # A table that exists is overwritten by this call too: a version with new columns may need table features, which
    # only this call sets.
    create_table_with_add_actions(
        place.url,
        schema,
        added,
        mode="overwrite",
        storage_options=storage_options(place),
        commit_properties=properties,
    )


def _added(file: dict[str, Any]) -> AddAction:
    from deltalake.transaction import AddAction

    stats = json.dumps({"numRecords": file["num_rows"]})
    return AddAction(file["name"], file["num_bytes"], {}, int(time.time() * 1000), True, stats)


def _version_of(table: Storage, newest: int, app_id: str) -> int:
    """Returns the version whose log file names `app_id`, the id of the commit, by a search back from `newest`."""
    logs = ((version, table / DELTA_LOG / f"{version:020}.json") for version in range(newest, -1, -1))
    return next(version for version, log in logs if app_id in log.read_text())


FORMAT = SinkFormat(
    "parquet",
    encode,
    stored_type=table_type,
    check_schema=check_schema,
    require=require_delta,
    needs_schema=True,
    publisher=DeltaPublisher(),
)
