"""From what the user wrote to the files of the input."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from ...engine.errors import ConfigError
from ..storage import FileInfo, Storage, StorageOptions
from .base import InputFile

EXTENSIONS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
TABLES = {"_delta_log": "Delta", "_versions": "Lance"}
"""What tells a folder of files from one whose files only its log explains."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def find_files(given: str | list[str], format: str | None, options: StorageOptions) -> list[InputFile]:
    """Finds the files of an input.

    Args:
        given: A path or URL, a pattern such as ``"data/*.parquet"``, a folder, or a list of these.
        format: Of the files; None to tell by the extension.
        options: How to reach what is behind a URL.

    Raises:
        ConfigError: Nothing is there.
    """
    places = [Storage.at(one, options=options) for one in ([given] if isinstance(given, str) else given)]
    found = [info for place in places for info in _expand(place, format)]
    return [
        InputFile(ordinal, Storage.at(info.url, options=options), info.size, info.etag)
        for ordinal, info in enumerate(found)
    ]


def format_of(files: Iterable[InputFile]) -> str:
    """Tells the format by the extensions.

    Raises:
        ConfigError: They are of no known kind, or of several.
    """
    paths = [file.path for file in files]
    kinds = {kind_of(path) for path in paths}
    if len(kinds) == 1 and (kind := kinds.pop()) is not None:
        return kind
    raise ConfigError(
        f"the format of {paths[0]!r} is not clear from the extension; set format to "
        f"{', '.join(sorted(set(EXTENSIONS.values())))}"
    )


def kind_of(path: str) -> str | None:
    """Returns the format that a file's name tells, or None."""
    return EXTENSIONS.get(_extensions(path)[0])


def compression_of(path: str) -> str | None:
    """Returns the compression that a file's name tells, or None."""
    return _extensions(path)[1]


def _extensions(path: str) -> tuple[str, str | None]:
    """Splits `x.jsonl.gz` into `.jsonl` and `gzip`."""
    name = PurePosixPath(path.partition("?")[0].lower())
    compression = COMPRESSIONS.get(name.suffix)
    return (PurePosixPath(name.stem).suffix if compression else name.suffix), compression


def _expand(place: Storage, format: str | None) -> list[FileInfo]:
    info = place.info()
    if info is not None:
        return _in_folder(place, format) if info.is_dir else [info]
    found = sorted(place.files.glob(place.url), key=lambda one: one.url) if _is_pattern(place) else []
    if not found:
        advice = "pass a file, a folder or a pattern such as data/*.parquet"
        raise ConfigError(f"input {place.url!r} does not exist; {advice}")
    return found


def _in_folder(place: Storage, format: str | None) -> list[FileInfo]:
    """Returns the files directly in a folder that are of a known kind; other programs' notes begin with . or _."""
    known = {extension for extension, kind in EXTENSIONS.items() if format in (None, kind)}
    found = sorted(place.files.children(place.url), key=lambda one: one.url)
    names = {one.url.rpartition("/")[2] for one in found}
    for mark, kind in TABLES.items():
        if mark in names:  # The folder may hold files that are no part of the table any more.
            raise ConfigError(
                f"input {place.url!r} is a {kind} table, which is not read; pass the list of its files, or an export"
            )
    wanted = [one for one in found if not one.is_dir and _extensions(one.url)[0] in known]
    visible = [one for one in wanted if one.url.rpartition("/")[2][0] not in "._"]
    if not visible:
        raise ConfigError(f"input folder {place.url!r} holds no file of a known kind ({', '.join(sorted(known))})")
    return visible


def _is_pattern(place: Storage) -> bool:
    return any(sign in place.url for sign in "*?[")
