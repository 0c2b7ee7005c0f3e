"""The input of a job: which files, of which format, with which columns and how many rows; and the dataset of them."""

from __future__ import annotations

import functools
import glob
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import ray.data

from ..engine.errors import ConfigError

EXTENSIONS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
}

READ_ERROR = "__read_error"
"""Why a line of the input is not a row; only between reading and preparing."""

LINES_PER_LOOK = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """Files with rows of one kind.

    Attributes:
        paths: The files.
        format: ``"parquet"``, ``"jsonl"`` or ``"csv"``.
        schema: Columns and types that hold every row.
        num_rows: Number of rows.
    """

    paths: list[str]
    format: str
    schema: pa.Schema
    num_rows: int

    @classmethod
    def find(cls, given: str | list[str], format: str | None = None) -> Source:
        """Finds and looks through the files.

        Args:
            given: A path, a pattern such as ``"data/*.parquet"``, a folder, or a list of these.
            format: ``"parquet"``, ``"jsonl"`` or ``"csv"``; None to tell by the extension.

        Raises:
            ConfigError: A file is missing, of an unknown kind, or cannot be read.
        """
        paths = [path for one in ([given] if isinstance(given, str) else given) for path in _expand(one, format)]
        kind = format or _format_of(paths)
        try:
            schema, num_rows = _LOOK[kind](paths)
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"input {given!r} cannot be read as {kind}: {_first_line(error)}") from error
        return cls(paths, kind, schema, num_rows)

    def read(self) -> ray.data.Dataset:
        """Returns the dataset of the rows; a line that is no row says so in the column `READ_ERROR`."""
        if self.format == "parquet":
            return ray.data.read_parquet(self.paths)
        if self.format == "csv":
            types = pyarrow.csv.ConvertOptions(column_types=self.schema)
            return ray.data.read_csv(self.paths, file_extensions=None, convert_options=types)
        lines = ray.data.read_text(self.paths, drop_empty_lines=True)
        parse = functools.partial(parse_lines, schema=self.schema)
        return lines.map_batches(parse, batch_size=None, batch_format="pyarrow")


def parse_lines(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Makes rows of lines of JSON.

    Args:
        table: Lines, in the column `text`.
        schema: Columns of the rows.

    Returns:
        A table of these columns and `READ_ERROR`.
    """
    rows = []
    for line in table["text"].to_pylist():
        values, error = parse_line(line)
        rows.append({**{name: _fit(value, schema, name) for name, value in values.items()}, READ_ERROR: error})
    return pa.Table.from_pylist(rows, schema.append(pa.field(READ_ERROR, pa.string())))


def parse_line(line: str) -> tuple[dict[str, Any], str | None]:
    """Reads a line of JSON.

    Args:
        line: One line.

    Returns:
        The row and None, or an empty row and why it is none.
    """
    try:
        value = json.loads(line)
    except ValueError as error:
        return {}, f"the line is not JSON ({error}): {line:.200}"
    if not isinstance(value, dict):
        return {}, f"the line is a JSON {type(value).__name__}, not an object: {line:.200}"
    return value, None


def _fit(value: Any, schema: pa.Schema, name: str) -> Any:
    """Writes as JSON what stands among text: a column whose values differ in type is a column of text."""
    if value is None or isinstance(value, str) or schema.field(name).type != pa.string():
        return value
    return json.dumps(value, ensure_ascii=False)


def _expand(given: str, format: str | None) -> list[str]:
    path = Path(given).expanduser()
    if path.is_dir():
        known = {extension for extension, kind in EXTENSIONS.items() if format in (None, kind)}
        found = sorted(str(one) for one in path.iterdir() if one.suffix in known and one.name[0] not in "._")
        if not found:
            raise ConfigError(f"input folder {given!r} holds no file of a known kind ({', '.join(sorted(known))})")
        return found
    if path.is_file():
        return [str(path)]
    found = sorted(one for one in glob.glob(str(path), recursive=True) if Path(one).is_file())
    if not found:
        raise ConfigError(f"input {given!r} does not exist; pass a file, a folder or a pattern such as data/*.parquet")
    return found


def _format_of(paths: list[str]) -> str:
    kinds = {EXTENSIONS.get(Path(path).suffix.lower()) for path in paths}
    if len(kinds) == 1 and (kind := kinds.pop()) is not None:
        return kind
    raise ConfigError(
        f"the format of {paths[0]!r} is not clear from the extension; set format to parquet, jsonl or csv"
    )


def _look_at_parquet(paths: list[str]) -> tuple[pa.Schema, int]:
    dataset = pyarrow.dataset.dataset(paths, format="parquet")
    schema = pa.unify_schemas([pyarrow.dataset.dataset(path).schema for path in paths], promote_options="permissive")
    return schema.remove_metadata(), dataset.count_rows()


def _look_at_csv(paths: list[str]) -> tuple[pa.Schema, int]:
    """Takes the types of the first rows if all rows have them, else text for all columns."""
    dataset = pyarrow.dataset.dataset(paths, format="csv")
    try:
        return dataset.schema, sum(batch.num_rows for batch in dataset.to_batches())
    except pa.ArrowInvalid:
        schema = pa.schema([(name, pa.string()) for name in dataset.schema.names])
        dataset = pyarrow.dataset.dataset(paths, format="csv", schema=schema)
        return schema, sum(batch.num_rows for batch in dataset.to_batches())


def _look_at_jsonl(paths: list[str]) -> tuple[pa.Schema, int]:
    """Reads everything once: only so is the type of every column known to hold every value."""
    schema, num_rows = pa.schema([]), 0
    lines = _lines(paths)
    while chunk := list(islice(lines, LINES_PER_LOOK)):
        num_rows += len(chunk)
        rows = [parse_line(line)[0] for line in chunk]
        for name in dict.fromkeys(name for row in rows for name in row):
            seen = schema.field(name).type if name in schema.names else pa.null()
            kind = _common_type(seen, [row.get(name) for row in rows])
            schema = _with_type(schema, name, kind)
    return pa.schema([(field.name, _writable(field.type)) for field in schema]), num_rows


def _lines(paths: list[str]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8") as file:
            # As Ray splits them: at newlines, empty lines left out.
            yield from (line for raw in file if (line := raw.rstrip("\r\n")).strip())


def _common_type(seen: pa.DataType, values: Iterable[Any]) -> pa.DataType:
    try:
        fields = [pa.schema([("value", kind)]) for kind in (seen, pa.array(values).type)]
        return pa.unify_schemas(fields, promote_options="permissive").field("value").type
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.string()


def _writable(kind: pa.DataType) -> pa.DataType:
    """Gives a column without any value the type text, which readers can join with anything."""
    return pa.string() if pa.types.is_null(kind) else kind


def _with_type(schema: pa.Schema, name: str, kind: pa.DataType) -> pa.Schema:
    field = pa.field(name, kind)
    return schema.set(schema.names.index(name), field) if name in schema.names else schema.append(field)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_LOOK = {"parquet": _look_at_parquet, "jsonl": _look_at_jsonl, "csv": _look_at_csv}
