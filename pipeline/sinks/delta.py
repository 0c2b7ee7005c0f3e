"""Delta tables as output: files that are there already become part of a table, all in one version.

A commit is written down before it is made (`TableCommit`, in the plan of `publish`). Its token goes into the table with
it, as the identifier of a transaction, so whoever finds the plan after a death sees whether the commit was made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ...engine.errors import ConfigError, StorageError
from ..files.delta import DELTA_LOG, is_table, one_line, open_table, require_delta, storage_options
from ..files.storage import Storage

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
"""Types that a table does not have, and those that hold their values."""


@dataclass(frozen=True, slots=True)
class TableCommit:
    """A version of a table, to be made once. It is plain data, for a plan in JSON.

    Attributes:
        token: What tells it from any other.
        replaces: Whether the files are all that the table will hold; else they are added.
        schema: Columns and types, as the log of a table has them.
        files: Name, number of rows and size of each file, as a manifest has them.
    """

    token: str
    replaces: bool
    schema: str
    files: Sequence[dict[str, Any]]


def table_schema(schema: pa.Schema) -> pa.Schema:
    """Returns the columns that a table has for those of a result, with types that hold their values.

    Args:
        schema: Columns and types of the result.

    Raises:
        ConfigError: A table has no type for a column, or the library is not installed.
    """
    require_delta()
    return pa.schema([(field.name, _table_type(field)) for field in schema])


def schema_text(schema: pa.Schema) -> str:
    """Returns columns and types as the log of a table has them."""
    from deltalake import Schema

    return Schema.from_arrow(schema).to_json()


def commit(table: Storage, made: TableCommit) -> int:
    """Makes files part of a table, which begins to exist if it does not, unless that was done before.

    Args:
        table: The table's folder. The files are in it.
        made: What the version consists of.

    Returns:
        The number of the version.

    Raises:
        ConfigError: The table is not there to add to, or the library is not installed.
        StorageError: The commit failed; nothing of it is to be seen.
    """
    app_id = f"millrace-{made.token}"
    found = open_table(table) if is_table(table) or not made.replaces else None
    if found is None or found.transaction_version(app_id) is None:
        try:
            _write(table, found, made, app_id)
        except Exception as error:  # The library raises bare ones too, and OSError.
            raise StorageError(f"cannot commit to the Delta table {table.url!r}: {one_line(error)}") from error
        found = open_table(table)
    return _version_of(table, found.version(), app_id)


def _write(place: Storage, table: DeltaTable | None, made: TableCommit, app_id: str) -> None:
    from deltalake import CommitProperties, Schema, Transaction
    from deltalake.transaction import create_table_with_add_actions

    properties = CommitProperties(app_transactions=[Transaction(app_id, 0)])
    schema, added = Schema.from_json(made.schema), [_added(one) for one in made.files]
    if table is not None and not made.replaces:
        table.create_write_transaction(list(added), "append", schema, commit_properties=properties)
        return
    # Also where a table is: a version with new columns needs its features as well, which only this sets.
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
    """Returns the version that a commit made: the newest one, unless others have written since."""
    logs = ((version, table / DELTA_LOG / f"{version:020}.json") for version in range(newest, -1, -1))
    return next(version for version, log in logs if app_id in log.read_text())


def _table_type(field: pa.Field) -> pa.DataType:
    from deltalake import Schema

    kind = WIDER.get(field.type, field.type)
    if pa.types.is_timestamp(kind):
        kind = pa.timestamp("us", None if kind.tz is None else "UTC")
    try:
        return pa.schema(Schema.from_arrow(pa.schema([(field.name, kind)])).to_arrow()).field(0).type
    except Exception as error:  # The library raises bare ones.
        raise ConfigError(
            f"column {field.name!r} is {field.type}, which a Delta table has no type for; leave it out with columns, "
            "or set another output_format"
        ) from error
