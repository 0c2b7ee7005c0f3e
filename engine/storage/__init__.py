"""Files wherever they are: on this machine or behind a URL, with retries."""

from __future__ import annotations

from .files import FileInfo, StorageOptions
from .location import Location
from .remote import RemoteFiles

__all__ = ["FileInfo", "Location", "RemoteFiles", "StorageOptions"]
