"""Delta tables for both input and output: finds and opens the log of a table with the library `deltalake`."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING

from ...engine.env import s3_endpoint
from ...engine.errors import ConfigError
from .storage import Storage

if TYPE_CHECKING:
    from deltalake import DeltaTable

DELTA_LOG = "_delta_log"
"""Name of the folder with the log of a table, which says which of its files count."""

MARKS = re.compile(r"\x1b\[[0-9;]*m|↳")


def require_delta() -> None:
    """Checks that the package `deltalake` is installed.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        importlib.import_module("deltalake")
    except ImportError as error:
        raise ConfigError("Delta tables need the package deltalake: pip install 'millrace[delta]'") from error


def is_table(place: Storage) -> bool:
    """Returns whether a folder is a Delta table, which is whether it contains a folder `DELTA_LOG`."""
    return (place / DELTA_LOG).is_dir()


def open_table(place: Storage, version: int | None = None) -> DeltaTable:
    """Opens the Delta table in a folder and reads its log.

    Args:
        place: The table's folder.
        version: The version to read; None for the newest.

    Raises:
        ConfigError: The package `deltalake` is not installed, or the log cannot be read.
    """
    require_delta()
    from deltalake import DeltaTable

    try:
        return DeltaTable(place.url, version=version, storage_options=storage_options(place))
    except Exception as error:  # The library raises bare exceptions too, and OSError.
        what = "its log" if version is None else f"version {version} of it, which the job was begun with,"
        raise ConfigError(f"Delta table {place.url!r}: {what} cannot be read: {one_line(error)}") from error


def storage_options(place: Storage) -> dict[str, str]:
    """Returns the options with which `deltalake` opens a table in a store: the endpoint, if it is not that of AWS.

    They hold no credentials, which `deltalake` itself takes from the environment.

    Args:
        place: The table's folder.
    """
    endpoint = (place.options.endpoint_url or s3_endpoint()) if place.protocol == "s3" else None
    if endpoint is None:
        return {}
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": str(endpoint.startswith("http://")).lower()}


def one_line(error: BaseException) -> str:
    """Returns the message of an error of `deltalake` in one line of at most 300 characters, without colour codes."""
    text = " ".join(MARKS.sub(" ", str(error)).split())
    return f"{text:.300}" if text else type(error).__name__
