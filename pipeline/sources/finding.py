"""Finds the files of an input from the paths, patterns and folders that the user wrote."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...engine.errors import ConfigError, quote
from ...engine.shown import without_secrets
from ..files.storage import FileInfo, Storage, StorageOptions
from .base import InputFile
from .file_name import split_extensions
from .format import TableKind
from .formats import FORMATS
from .tables import TABLES

logger = logging.getLogger(__name__)

LANCE_VERSIONS = "_versions"
"""Name of a folder that only a Lance table has."""


def find_files(
    given: str | list[str], format: str | None, options: StorageOptions, versions: Mapping[str, int]
) -> list[InputFile]:
    """Finds the files of an input.

    Args:
        given: A path or URL, a pattern such as ``"data/*.parquet"``, a folder or table, or a list of these.
        format: Name of a format or of a kind of table; None to tell it by extensions and logs.
        options: Options for access to files behind a URL.
        versions: URL of a table -> version to read; other tables are read in their newest version.

    Raises:
        ConfigError: A place holds no files, or is not of the given format.
    """
    places = [Storage.at(one, options=options) for one in ([given] if isinstance(given, str) else given)]
    found = [file for place in places for file in _files_at(place, format, versions)]
    _warn_of_repeated(found)
    return [replace(file, ordinal=ordinal) for ordinal, file in enumerate(found)]


def _warn_of_repeated(found: Iterable[InputFile]) -> None:
    """Logs a warning if a file is found twice, because each of its rows then counts twice."""
    counts = Counter(os.path.realpath(file.path) if file.storage.is_local else file.path for file in found)
    repeated = [path for path, count in counts.items() if count > 1]
    if repeated:
        logger.warning(
            "the input has %s and %d more files more than once, and reads their rows as often",
            quote(without_secrets(repeated[0])),
            len(repeated) - 1,
        )


def format_of(files: Iterable[InputFile]) -> str:
    """Returns the name of the format that all files have, by their extensions.

    Raises:
        ConfigError: An extension is unknown, or the files have several formats.
    """
    names = _names_by_extension()
    paths = [file.path for file in files]
    kinds = {
        names.get(split_extensions(file.path)[0]) if file.table is None else file.table.file_format for file in files
    }
    if len(kinds) == 1 and (kind := kinds.pop()) is not None:
        return kind
    raise ConfigError(
        f"the format of {paths[0]!r} is not clear from the extension; set format to {', '.join(FORMATS.names)}"
    )


def _names_by_extension() -> dict[str, str]:
    return {extension: name for name, format in FORMATS.items() for extension in format.extensions}


def _files_at(place: Storage, format: str | None, versions: Mapping[str, int]) -> list[InputFile]:
    info = place.info()
    if info is not None and info.is_dir and (found := _table_at(place)) is not None:
        name, table = found
        if format not in (None, name, table.file_format):
            raise ConfigError(
                f"input {quote(place.url)} is a {table.title}, whose files are {table.file_format}; got format "
                f"{format!r}"
            )
        return table.files(place, versions.get(without_secrets(place.url)))
    if format in TABLES.names:
        raise ConfigError(
            f"input {quote(place.url)} is no {TABLES[format].title}: it holds no {TABLES[format].log_folder}"
        )
    files = _expand(place, info, format)
    if info is None or info.is_dir:  # A single file of a table may be read: the user named it.
        _refuse_parts_of_tables(place, files)
    return [InputFile(0, Storage.at(one.url, options=place.options), one.size, one.etag) for one in files]


def _table_at(folder: Storage) -> tuple[str, TableKind] | None:
    """Returns the name and the kind of the table that a folder is; None for a folder that is no table."""
    return next(((name, table) for name, table in TABLES.items() if (folder / table.log_folder).is_dir()), None)


def _refuse_parts_of_tables(place: Storage, found: Iterable[FileInfo]) -> None:
    """Raises `ConfigError` if a file belongs to a table, because the file may hold rows deleted from the table."""
    for root in dict.fromkeys(_root_of(replace(place, url=one.url)) for one in found):
        if (table := _table_at(root)) is not None:
            raise ConfigError(
                f"input {quote(place.url)} finds files of the {table[1].title} {root.url!r}; pass the table's folder"
            )


def _root_of(file: Storage) -> Storage:
    """Returns the folder above a file, and above the partition folders of the file, such as ``day=3/hour=7``."""
    folder = replace(file, url=file.url.rpartition("/")[0])
    while "=" in folder.name:
        folder = replace(folder, url=folder.url.rpartition("/")[0])
    return folder


def _expand(place: Storage, info: FileInfo | None, format: str | None) -> list[FileInfo]:
    if info is not None:
        return _in_folder(place, format) if info.is_dir else [info]
    found = sorted(place.files.glob(_pattern(place)), key=lambda one: one.url) if _is_pattern(place.url) else []
    if not found:
        advice = "pass a file, a folder or a pattern such as data/*.parquet"
        raise ConfigError(f"input {quote(place.url)} does not exist; {advice}")
    return found


def _in_folder(place: Storage, format: str | None) -> list[FileInfo]:
    """Returns the files in a folder and its partition folders, such as ``day=3/hour=7``, that have a known extension.

    With a `format`, only its extensions are known. Names that start with . or _ are skipped.
    """
    known = {extension for extension, name in _names_by_extension().items() if format in (None, name)}
    found = place.files.children(place.url)
    if LANCE_VERSIONS in {_name_of(one) for one in found}:
        raise ConfigError(
            f"input {quote(place.url)} is a Lance table, which is not read; pass an export, in Parquet say"
        )
    _warn_of_folders(place, [name for one in found if one.is_dir and "=" not in (name := _name_of(one))])
    if any(one.is_dir and "=" in _name_of(one) for one in found):
        inside = (
            (one, one.url.removeprefix(place.url).strip("/").split("/")[:-1]) for one in place.files.walk(place.url)
        )
        found = [one for one, folders in inside if all("=" in folder for folder in folders)]
    wanted = [one for one in found if not one.is_dir and split_extensions(one.url)[0] in known]
    visible = sorted((one for one in wanted if _name_of(one)[0] not in "._"), key=lambda one: one.url)
    data = [one for one in visible if split_extensions(one.url)[0] not in _extensions_of_notes()]
    visible = data or visible
    if not visible:
        raise ConfigError(f"input folder {quote(place.url)} holds no file of a known kind ({', '.join(sorted(known))})")
    return visible


def _extensions_of_notes() -> set[str]:
    return {extension for _, format in FORMATS.items() if format.is_often_a_note for extension in format.extensions}


def _warn_of_folders(place: Storage, names: Iterable[str]) -> None:
    """Logs a warning if a folder has other folders that are not read."""
    visible = sorted(name for name in names if name[:1] not in ("", ".", "_"))
    if visible:
        logger.warning(
            "the folders inside of input folder %s are not read (%s and %d more); list them in input, or use a pattern",
            quote(place.url),
            quote(visible[0]),
            len(visible) - 1,
        )


def _name_of(file: FileInfo) -> str:
    return file.url.rstrip("/").rpartition("/")[2]


def _is_pattern(url: str) -> bool:
    return any(sign in url for sign in "*?[")


def _pattern(place: Storage) -> str:
    """Returns a pattern in which the folders that exist by the name as it is written, such as ``a[1]``, are names."""
    protocol, divider, path = place.url.rpartition("://")
    folder, *rest = path.split("/")
    while rest and (not _is_pattern(folder) or replace(place, url=f"{protocol}{divider}{folder}").is_dir()):
        folder, rest = f"{folder}/{rest[0]}", rest[1:]
    above, slash, name = folder.rpartition("/")
    return protocol + divider + "/".join([glob.escape(above) + slash + name, *rest])
