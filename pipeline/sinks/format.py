"""`SinkFormat`: how tables become the files of an output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from ...engine.errors import ConfigError
from ..arrow_values import UNFIT, depth, has_empty_struct, json_field, make_array, plain_type
from ..mixed_values import MAX_DEPTH, MAX_FIELDS, holds_json
from .publisher import ManifestPublisher, Publisher


def _unchanged(kind: pa.DataType) -> pa.DataType:
    return kind


def _nothing() -> None:
    """Raises nothing: the format needs no package beside those that are always there."""


def _any_schema(_: pa.Schema) -> None:
    """Raises nothing: files of the format hold any columns together."""


@dataclass(frozen=True, slots=True)
class SinkFormat:
    """A format that results are written in.

    Attributes:
        extension: Extension of the files, without the dot.
        encode: Turns a table into the bytes of a file.
        stored_type: Takes the type of a column, and returns the type in which this format stores it.
        max_fields: Most keys that the objects of a column may have together in a struct, if their types are not given.
            With more, and with 0, each object is JSON text, so that it keeps its own keys.
        check_schema: Raises a `ConfigError` if columns cannot be stored together.
        require: Raises a `ConfigError` if a package that the format needs is not installed.
        needs_schema: Whether columns and types must be known before the first row is written.
        publisher: Makes the files visible to readers.
    """

    extension: str
    encode: Callable[[pa.Table], bytes]
    stored_type: Callable[[pa.DataType], pa.DataType] = _unchanged
    max_fields: int = MAX_FIELDS
    check_schema: Callable[[pa.Schema], None] = _any_schema
    require: Callable[[], None] = _nothing
    needs_schema: bool = False
    publisher: Publisher = field(default_factory=ManifestPublisher)

    def fit_schema(self, schema: pa.Schema) -> pa.Schema:
        """Returns the columns of results in types that this format stores, and with which tables can be sorted.

        A column with a struct without fields becomes JSON in a column of text, unless the format has structs like that.

        Args:
            schema: Columns and types of the results.

        Raises:
            ConfigError: The format has no type for a column, or needs a package that is not installed.
        """
        self.require()
        fitted = pa.schema([self._fitted(field) for field in schema])
        self.check_schema(fitted)
        return fitted

    def _fitted(self, field: pa.Field) -> pa.Field:
        kind = plain_type(field.type)
        fields = [pa.field(field.name, kind, metadata=field.metadata)]
        if holds_json(field) and not self.max_fields:
            fields = [json_field(field.name)]
        if has_empty_struct(kind):
            fields.append(json_field(field.name))
        for one in fields:
            try:
                stored = one.with_type(self.stored_type(one.type))
                self._check(stored)
            except (*UNFIT, OSError):  # Parquet raises OSError for a decimal that it has no type for.
                continue
            return stored
        raise ConfigError(
            f"column {field.name!r} is {field.type!s:.200}, which output_format has no type for; leave it out with "
            "columns, or set another output_format"
        )

    def _check(self, field: pa.Field) -> None:
        """Raises if a column cannot be made, sorted or written. The libraries say so only when they are tried."""
        if depth(field.type) > MAX_DEPTH:
            raise RecursionError(f"{field.type} is nested too deeply")
        rows = pa.table({field.name: make_array([None], field.type)})
        self.encode(rows.take(pa.array([0])))
