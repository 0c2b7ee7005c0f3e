"""Extensions of file names, with and without a compression."""

from __future__ import annotations

from pathlib import PurePosixPath

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def split_extensions(path: str) -> tuple[str, str | None]:
    """Returns extension and compression: `.jsonl` and `gzip` for `x.jsonl.gz`, `.csv` and None for `x.csv`."""
    name = PurePosixPath(path.partition("?")[0].lower())
    compression = COMPRESSIONS.get(name.suffix)
    return (PurePosixPath(name.stem).suffix if compression else name.suffix), compression


def compression_of(path: str) -> str | None:
    """Returns the compression by the extension of a file; None for a file that is not compressed."""
    return split_extensions(path)[1]
