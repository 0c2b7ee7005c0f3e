"""`SinkFormat`: how tables become the files of an output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from .publisher import ManifestPublisher, Publisher


def _unchanged(schema: pa.Schema) -> pa.Schema:
    return schema


@dataclass(frozen=True, slots=True)
class SinkFormat:
    """A format that results are written in.

    Attributes:
        extension: Extension of the files, without the dot.
        encode: Turns a table into the bytes of a file.
        fit_schema: Takes the columns and types of the results, and returns the types in which this format stores
            them. It raises `ConfigError` for a column that the format has no type for.
        needs_schema: Whether columns and types must be known before the first row is written.
        publisher: Makes the files visible to readers.
    """

    extension: str
    encode: Callable[[pa.Table], bytes]
    fit_schema: Callable[[pa.Schema], pa.Schema] = _unchanged
    needs_schema: bool = False
    publisher: Publisher = field(default_factory=ManifestPublisher)
