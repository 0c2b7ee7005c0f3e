"""`Storage`: a file or folder of a job, with the file objects and file systems that Arrow needs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa
import pyarrow.fs

from ...engine.errors import DamagedOutputError
from ...engine.storage import BUFFER_BYTES, FileInfo, Location, StorageOptions
from ...engine.storage.local import LocalFiles, refuse_special
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
            refuse_special(self.url)
            return pa.OSFile(os.fsencode(self.url), "rb")  # A name may be no UTF-8.
        return pa.PythonFile(self.open_input(buffer_bytes, size), mode="r")

    def read_json(self) -> Any:
        """Returns the value in a file of JSON that a stranger may have written.

        Raises:
            ValueError: The file is no JSON, is nested too deeply, or is a folder or another thing that holds no bytes.
        """
        try:
            return json.loads(self.read_bytes())
        except RecursionError:
            raise ValueError("its brackets are nested too deeply") from None
        except IsADirectoryError:
            raise ValueError("it is a folder") from None

    def write_private(self, data: bytes) -> None:
        """Writes the whole file, and makes its parents. On this machine, only its owner may read the file."""
        if self.is_local:
            LocalFiles().write(self.url, data, mode=0o600)
        else:
            self.write_bytes(data)

    def inside(self, name: str) -> Self:
        """Returns the location of the file `name` in this folder, where a file that others may have written names it.

        Raises:
            DamagedOutputError: The name, or a link on the way, leads out of the folder.
        """
        parts = name.split("/") if isinstance(name, str) else []
        found = self / str(name)
        leads_out = not parts or any(part in ("", ".", "..") for part in parts) or any(c in name for c in "\\:?#\0")
        if not leads_out and self.is_local:
            folder = os.path.realpath(self.url)
            leads_out = os.path.commonpath([folder, os.path.realpath(os.path.dirname(found.url))]) != folder
        if leads_out:
            raise DamagedOutputError(
                f"a file in {self.url!r} names {name!r:.200}, which is not inside that folder: a job has not written "
                "it; pass another folder"
            )
        return found

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Returns a file system for Arrow, and the path of the file or folder in it."""
        if self.is_local:
            return pyarrow.fs.LocalFileSystem(), self.url
        handler = ArrowFiles(self.protocol, self.options)
        return pyarrow.fs.PyFileSystem(handler), self.url.partition("://")[2]
