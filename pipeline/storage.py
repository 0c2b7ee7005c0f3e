"""The files of a job: those of `engine.storage`, and what Arrow needs to read and write them."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs

from ..engine.storage import BUFFER_BYTES, FileInfo, Location, RemoteFiles, StorageOptions

__all__ = ["FileInfo", "Storage", "StorageOptions"]


@dataclass(frozen=True, slots=True)
class Storage(Location):
    """A file or a folder of a job, local or behind a URL, for Python and for Arrow."""

    def open_arrow(self, buffer_bytes: int = BUFFER_BYTES) -> pa.NativeFile:
        """Opens the file for reading at any place, as Arrow does.

        Args:
            buffer_bytes: What one request asks for, at least, when the file is behind a URL.
        """
        if self.is_local:
            return pa.OSFile(self.url, "rb")
        return pa.PythonFile(self.open_input(buffer_bytes), mode="r")

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Returns Arrow's face of the storage, and the path in it. It has the library's retries, not ours."""
        if self.is_local:
            return pyarrow.fs.LocalFileSystem(), self.url
        library = RemoteFiles(self.protocol, self.options).library
        handler = pyarrow.fs.FSSpecHandler(library)
        return pyarrow.fs.PyFileSystem(handler), library._strip_protocol(self.url)
