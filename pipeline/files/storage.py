"""The files of a job: those of `engine.storage`, and what Arrow needs to read and write them."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs

from ...engine.storage import BUFFER_BYTES, FileInfo, Location, StorageOptions
from .arrow_files import ArrowFiles

__all__ = ["FileInfo", "Storage", "StorageOptions"]


@dataclass(frozen=True, slots=True)
class Storage(Location):
    """A file or a folder of a job, local or behind a URL, for Python and for Arrow."""

    def open_arrow(self, buffer_bytes: int = BUFFER_BYTES, size: int | None = None) -> pa.NativeFile:
        """Opens the file for reading at any place, as Arrow does.

        Args:
            buffer_bytes: What one request asks for, at least, when the file is behind a URL.
            size: Of the file, if it is known; else the store is asked.
        """
        if self.is_local:
            return pa.OSFile(self.url, "rb")
        return pa.PythonFile(self.open_input(buffer_bytes, size), mode="r")

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Returns Arrow's face of the storage, and the path in it."""
        if self.is_local:
            return pyarrow.fs.LocalFileSystem(), self.url
        handler = ArrowFiles(self.protocol, self.options)
        return pyarrow.fs.PyFileSystem(handler), self.url.partition("://")[2]
