"""`Location`: access to files and folders on this machine or behind a URL, with retries."""

from __future__ import annotations

from .files import FileInfo, StorageOptions
from .location import BUFFER_BYTES, Location
from .remote import RemoteFiles

__all__ = ["BUFFER_BYTES", "FileInfo", "Location", "RemoteFiles", "StorageOptions"]
