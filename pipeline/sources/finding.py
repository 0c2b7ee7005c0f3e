"""From what the user wrote to the files of the input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from ...engine.errors import ConfigError
from ..files.delta import DELTA, DELTA_LOG, is_table
from ..files.storage import FileInfo, Storage, StorageOptions
from .base import InputFile
from .delta import table_files

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
LANCE_VERSIONS = "_versions"
"""Folder that only a Lance table has."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def find_files(
    given: str | list[str], format: str | None, options: StorageOptions, versions: Mapping[str, int]
) -> list[InputFile]:
    """Finds the files of an input.

    Args:
        given: A path or URL, a pattern such as ``"data/*.parquet"``, a folder or table, or a list of these.
        format: Of the files; None to tell by the extension.
        options: How to reach what is behind a URL.
        versions: Of Delta tables, by their URL, if they are not to be read as they are now.

    Raises:
        ConfigError: Nothing is there, or it is no table and is said to be one.
    """
    places = [Storage.at(one, options=options) for one in ([given] if isinstance(given, str) else given)]
    found = [file for place in places for file in _files_at(place, format, versions)]
    return [replace(file, ordinal=ordinal) for ordinal, file in enumerate(found)]


def format_of(files: Iterable[InputFile]) -> str:
    """Tells the format by the extensions.

    Raises:
        ConfigError: They are of no known kind, or of several.
    """
    paths = [file.path for file in files]
    kinds = {kind_of(file.path) if file.table is None else "parquet" for file in files}
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


def _files_at(place: Storage, format: str | None, versions: Mapping[str, int]) -> list[InputFile]:
    info = place.info()
    if info is not None and info.is_dir and is_table(place):
        if format not in (None, DELTA, "parquet"):
            raise ConfigError(f"input {place.url!r} is a Delta table, whose files are Parquet; got format {format!r}")
        return table_files(place, versions.get(place.url))
    if format == DELTA:
        raise ConfigError(f"input {place.url!r} is no Delta table: it holds no {DELTA_LOG}")
    found = _expand(place, info, format)
    if info is None or info.is_dir:  # Who names a single file of a table means that one.
        _refuse_parts_of_tables(place, found)
    return [InputFile(0, Storage.at(one.url, options=place.options), one.size, one.etag) for one in found]


def _refuse_parts_of_tables(place: Storage, found: Iterable[FileInfo]) -> None:
    """Raises if files are those of a Delta table: some may hold rows that the table does not have any more."""
    for root in dict.fromkeys(_root_of(replace(place, url=one.url)) for one in found):
        if is_table(root):
            raise ConfigError(
                f"input {place.url!r} finds files of the Delta table {root.url!r}; pass the table's folder"
            )


def _root_of(file: Storage) -> Storage:
    """Returns the folder that a file belongs to if it stands in folders of partitions, such as ``day=3/hour=7``."""
    folder = replace(file, url=file.url.rpartition("/")[0])
    while "=" in folder.name:
        folder = replace(folder, url=folder.url.rpartition("/")[0])
    return folder


def _expand(place: Storage, info: FileInfo | None, format: str | None) -> list[FileInfo]:
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
    if LANCE_VERSIONS in names:
        raise ConfigError(f"input {place.url!r} is a Lance table, which is not read; pass an export, in Parquet say")
    wanted = [one for one in found if not one.is_dir and _extensions(one.url)[0] in known]
    visible = [one for one in wanted if one.url.rpartition("/")[2][0] not in "._"]
    if not visible:
        raise ConfigError(f"input folder {place.url!r} holds no file of a known kind ({', '.join(sorted(known))})")
    return visible


def _is_pattern(place: Storage) -> bool:
    return any(sign in place.url for sign in "*?[")
