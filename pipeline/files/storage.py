"""`Storage`: a file or folder of a job, with the file objects and file systems that Arrow needs."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs

from ...engine.storage import BUFFER_BYTES, FileInfo, Location, StorageOptions
from .arrow_files import ArrowFiles

__all__ = ["FileInfo", "Storage", "StorageOptions"]


@dataclass(frozen=True, slots=True, repr=False)  # `Location` has one without secrets.
class Storage(Location):
    """A file or a folder of a job, local or behind a URL, for Python and for Arrow."""

    def open_arrow(self, buffer_bytes: int = BUFFER_BYTES, size: int | None = None) -> pa.NativeFile:
        """Opens the file as an Arrow file, for reading at any offset.

        Args:
            buffer_bytes: Least size of a request, for a file behind a URL.
            size: Size of the file in bytes; None to ask the store.
        """
        if self.is_local:
            return pa.OSFile(self.url, "rb")
        return pa.PythonFile(self.open_input(buffer_bytes, size), mode="r")

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Returns a file system for Arrow, and the path of the file or folder in it."""
        if self.is_local:
            return pyarrow.fs.LocalFileSystem(), self.url
        handler = ArrowFiles(self.protocol, self.options)
        return pyarrow.fs.PyFileSystem(handler), self.url.partition("://")[2]
