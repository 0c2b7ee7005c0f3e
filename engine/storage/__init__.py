"""`Location`: access to files and folders on this machine or behind a URL, with retries."""

from __future__ import annotations

from .files import FileInfo, StorageOptions
from .json_file import read_json, read_json_object
from .location import BUFFER_BYTES, Location
from .remote import RemoteFiles

__all__ = ["BUFFER_BYTES", "FileInfo", "Location", "RemoteFiles", "StorageOptions", "read_json", "read_json_object"]
