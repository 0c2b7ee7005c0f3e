"""`ArrowFiles`: a file system for Arrow over the files behind a URL, with our retries and checks of lengths."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.fs

from ...engine.errors import StorageError
from ...engine.storage import FileInfo, Location, StorageOptions


class ArrowFiles(pyarrow.fs.FileSystemHandler):
    """The handler with which a `pyarrow.fs.PyFileSystem` reaches the files of the pipeline's stores.

    Paths are URLs without the protocol and ``://``.

    Args:
        protocol: The protocol of the URLs, such as ``"s3"``.
        options: Options for access to the files.
    """

    def __init__(self, protocol: str, options: StorageOptions) -> None:
        self._protocol = protocol
        self._options = options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArrowFiles) and vars(self) == vars(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((self._protocol, self._options))

    def get_type_name(self) -> str:
        """Returns the name that Arrow shows."""
        return f"millrace+{self._protocol}"

    def normalize_path(self, path: str) -> str:
        """Returns a path without the slash at its end."""
        return path.rstrip("/")

    def get_file_info(self, paths: Iterable[str]) -> list[pyarrow.fs.FileInfo]:
        """Returns the type and size of each path; the type is `NotFound` for a path that does not exist."""
        return [_to_arrow(path, self._at(path).info()) for path in paths]

    def get_file_info_selector(self, selector: pyarrow.fs.FileSelector) -> list[pyarrow.fs.FileInfo]:
        """Returns the type and size of each entry of a folder, and of its subfolders if the selector is recursive."""
        place = self._at(selector.base_dir)
        found = place.files.walk(place.url) if selector.recursive else place.files.children(place.url)
        infos = [_to_arrow(info.url.partition("://")[2], info) for info in found]
        if not infos and not selector.allow_not_found and not place.exists():
            raise FileNotFoundError(place.url)
        return infos

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Opens a file for reading at any offset."""
        return pa.PythonFile(self._at(path).open_input(), mode="r")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """Opens a file for reading from its start."""
        return self.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """Opens a file for writing. Its content is written when it is closed, all at once."""
        return pa.PythonFile(_Draft(self._at(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """Raises `StorageError`, because object stores cannot append."""
        raise StorageError(f"cannot append to {self._at(path)}")

    def create_dir(self, path: str, recursive: bool) -> None:
        """Creates a folder, if the store has folders."""
        self._at(path).make_folder()

    def delete_dir(self, path: str) -> None:
        """Removes a folder with everything in it."""
        self._at(path).remove()

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Removes everything in a folder."""
        for child in self._at(path).list():
            child.remove()

    def delete_root_dir_contents(self) -> None:
        """Raises `StorageError`, because no job removes a whole store."""
        raise StorageError(f"refused to remove all of {self._protocol}://")

    def delete_file(self, path: str) -> None:
        """Removes a file."""
        self._at(path).remove()

    def move(self, src: str, dest: str) -> None:
        """Renames a file."""
        self._at(src).move_to(self._at(dest))

    def copy_file(self, src: str, dest: str) -> None:
        """Copies a file."""
        self._at(dest).write_bytes(self._at(src).read_bytes())

    def _at(self, path: str) -> Location:
        return Location(f"{self._protocol}://{path}", self._options)


class _Draft(io.BytesIO):
    """A file in memory whose content is written to its target when the file is closed."""

    def __init__(self, target: Location) -> None:
        super().__init__()
        self._target = target

    def close(self) -> None:
        if not self.closed:
            self._target.write_bytes(self.getvalue())
        super().close()


def _to_arrow(path: str, info: FileInfo | None) -> pyarrow.fs.FileInfo:
    if info is None:
        return pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.NotFound)
    kind = pyarrow.fs.FileType.Directory if info.is_dir else pyarrow.fs.FileType.File
    return pyarrow.fs.FileInfo(path, kind, size=None if info.is_dir else info.size)
