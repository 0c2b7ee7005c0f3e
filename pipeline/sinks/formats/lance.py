"""Output as Lance tables: files in Lance's format that a commit makes visible, all in one version.

The parts are whole data files, which `publish` moves into the folder of the table. A commit then names them. It carries
an id that its plan has written down, so a run that finds the plan after a death looks for the id among the table's
transactions, which say whether the commit was made.
"""

from __future__ import annotations

import base64
import importlib
import json
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ....engine.env import s3_endpoint
from ....engine.errors import ConfigError, StorageError
from ...arrow_values import stored_type
from ...files.storage import Storage
from ..format import SinkFormat
from ..publisher import Publisher

if TYPE_CHECKING:
    from lance import LanceDataset

DATA = "data"
"""Name of the folder in a table that holds its data files."""

LOGS = ("_versions", "_transactions")
"""Names of the folders in a table that say which of its files count."""

FILE_VERSION = "2.1"
"""Version of Lance's file format, in which the place of a column in a file follows from the schema alone."""


def require_lance() -> None:
    """Checks that the package `pylance` is installed.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        importlib.import_module("lance")
    except ImportError as error:
        raise ConfigError("Lance tables need the package pylance: pip install 'millrace[lance]'") from error


def encode(table: pa.Table) -> bytes:
    """Returns the bytes of a data file that holds the rows of a table."""
    require_lance()
    from lance.file import LanceFileWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.lance"
        with LanceFileWriter(str(path), table.schema.remove_metadata(), version=FILE_VERSION) as writer:
            for batch in table.replace_schema_metadata(None).to_batches():
                writer.write_batch(batch)
        return path.read_bytes()


def table_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type with which a Lance table stores a column of the given type.

    Raises:
        ValueError: A Lance table has no type for the column.
    """
    stored = pa.string() if pa.types.is_null(kind) else stored_type(kind)
    try:
        _describe(pa.schema([("value", stored)]))
    except Exception as error:  # The library raises bare exceptions.
        raise ValueError(f"a Lance table has no type for {kind}") from error
    return stored


class LancePublisher(Publisher):
    """A publisher that makes files visible by one commit to a Lance table."""

    log_names = (*LOGS, DATA)
    files_folder = f"{DATA}/"

    def file_suffix(self, token: str) -> str:
        """Returns a suffix that makes every file name new: older versions of the table still refer to older files."""
        return f"-{token}"

    def plan_commit(
        self, token: str, schema: pa.Schema | None, files: Sequence[dict[str, Any]], *, replaces: bool
    ) -> dict[str, Any] | None:
        """Returns the id, the schema and the files of a version, which `commit` takes; see `Publisher.plan_commit`."""
        assert schema is not None
        plain = pa.schema([(field.name, field.type) for field in schema])
        text = base64.b64encode(plain.serialize().to_pybytes()).decode()
        return {"id": str(uuid.UUID(token)), "replaces": replaces, "schema": text, "files": list(files)}

    def commit(self, output: Storage, planned: dict[str, Any] | None) -> int | None:
        """Commits the planned version, unless it exists, and returns its number.

        Raises:
            ConfigError: The package `pylance` is not installed.
            StorageError: The commit failed, and readers see nothing of it.
        """
        assert planned is not None
        require_lance()
        try:
            table = open_table(output)
            made = None if table is None else _version_of(table, planned["id"])
            return _commit(output, table, planned) if made is None else made
        except Exception as error:  # The library raises bare exceptions too, and OSError.
            reason = " ".join(str(error).split())
            raise StorageError(f"cannot commit to the Lance table {output.url!r}: {reason:.300}") from error

    def kept_names(self, output: Storage) -> set[str]:
        """Returns the folders of a table, whose older versions stay readable."""
        return set(self.log_names) if (output / LOGS[0]).is_dir() else set()


def open_table(place: Storage) -> LanceDataset | None:
    """Opens the newest version of the Lance table in a folder; None if the folder is no table."""
    import lance

    if not (place / LOGS[0]).is_dir():
        return None
    return lance.dataset(place.url, storage_options=storage_options(place))


def storage_options(place: Storage) -> dict[str, str] | None:
    """Returns the options with which `lance` opens a table in a store: the endpoint, if it is not that of AWS.

    They hold no credentials, which `lance` itself takes from the environment.

    Args:
        place: The table's folder.
    """
    endpoint = (place.options.endpoint_url or s3_endpoint()) if place.protocol == "s3" else None
    if endpoint is None:
        return None
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


def _version_of(table: LanceDataset, commit_id: str) -> int | None:
    """Returns the version that a commit with this id has made; None if there is none."""
    newest = int(table.version)
    made = [one is not None and one.uuid == commit_id for one in table.get_transactions(newest)]
    return newest - made.index(True) if True in made else None


def _commit(place: Storage, table: LanceDataset | None, planned: dict[str, Any]) -> int:
    from lance import LanceDataset, LanceOperation, Transaction

    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(planned["schema"])))
    described = _describe(schema)
    fragments = [_fragment(described, file) for file in planned["files"]]
    replaces = planned["replaces"] or table is None
    operation = LanceOperation.Overwrite(schema, fragments) if replaces else LanceOperation.Append(fragments)
    read_version = 0 if table is None else int(table.version)
    transaction = Transaction(read_version, operation, uuid=planned["id"])
    made = LanceDataset.commit(place.url, transaction, storage_options=storage_options(place))
    return int(made.version)


def _describe(schema: pa.Schema) -> dict[str, Any]:
    """Returns how a table describes a file with the columns of a schema, from a file with one row of nulls."""
    from lance.fragment import LanceFragment

    row = pa.table([pa.nulls(1, field.type) for field in schema], schema=schema)
    with tempfile.TemporaryDirectory() as folder:
        described: dict[str, Any] = LanceFragment.create(folder, row, data_storage_version=FILE_VERSION).to_json()
    return described


def _fragment(described: dict[str, Any], file: dict[str, Any]) -> Any:
    """Returns the entry of a data file in a commit: that of the file of `_describe`, with other rows in it."""
    from lance.fragment import FragmentMetadata

    own = {"path": file["name"].removeprefix(f"{DATA}/"), "file_size_bytes": file["num_bytes"]}
    entry = {**described, "physical_rows": file["num_rows"], "files": [{**described["files"][0], **own}]}
    return FragmentMetadata.from_json(json.dumps(entry))


FORMAT = SinkFormat(
    "lance", encode, stored_type=table_type, require=require_lance, needs_schema=True, publisher=LancePublisher()
)
