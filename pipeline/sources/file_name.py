"""Names of files and folders: extensions, with and without a compression, and values of partition columns."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""Value in the name of a folder with the rows that have no value, as Hive and Spark write it."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def split_extensions(path: str) -> tuple[str, str | None]:
    """Returns extension and compression: `.jsonl` and `gzip` for `x.jsonl.gz`, `.csv` and None for `x.csv`."""
    if path.startswith(("http://", "https://")):
        path = urlsplit(path).path
    name = PurePosixPath(path.lower())
    compression = COMPRESSIONS.get(name.suffix)
    return (PurePosixPath(name.stem).suffix if compression else name.suffix), compression


def partition_of(path: str) -> dict[str, str | None]:
    """Returns the columns in the names of the folders directly above a file: ``{"day": "3"}`` for `x/day=3/a.csv`."""
    columns: dict[str, str | None] = {}
    for folder in reversed(path.split("/")[:-1]):
        name, equals, value = folder.partition("=")
        if not name or not equals:
            break
        columns = {unquote(name): None if value == NO_VALUE else unquote(value), **columns}
    return columns


def compression_of(path: str) -> str | None:
    """Returns the compression by the extension of a file; None for a file that is not compressed."""
    return split_extensions(path)[1]
