"""`LocalFiles`: files of this machine."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from .files import FileInfo


class LocalFiles:
    """The operations of `Files` on files of this machine; each URL is a path."""

    def info(self, url: str) -> FileInfo | None:
        """Returns the attributes of a file or folder; None if it does not exist."""
        return _describe(Path(url))

    def children(self, url: str) -> list[FileInfo]:
        """Returns the attributes of the direct children of a folder; an empty list if the folder does not exist."""
        folder = Path(url)
        return list(_describe_all(folder.iterdir())) if folder.is_dir() else []

    def walk(self, url: str) -> Iterator[FileInfo]:
        """Yields the attributes of each file in a folder and its subfolders; nothing if the folder does not exist."""
        for folder, _, names in os.walk(url):
            yield from _describe_all(Path(folder, name) for name in names)

    def glob(self, pattern: str) -> list[FileInfo]:
        """Returns the attributes of the files, not folders, whose URL matches a pattern with `*`, `**` and `?`."""
        return [one for one in _describe_all(map(Path, glob.glob(pattern, recursive=True))) if not one.is_dir]

    def read(self, url: str, start: int, end: int | None) -> bytes:
        """Returns the bytes from `start` to before `end`, or to the end of the file."""
        with open(url, "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def write(self, url: str, data: bytes) -> None:
        """Writes a whole file atomically, by renaming a complete temporary file, and makes its parent folders."""
        path = Path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def move(self, url: str, target: str) -> None:
        """Moves a file to the path `target`, replaces a file that is there, and makes its parent folders."""
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(url, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self.write(target, Path(url).read_bytes())
            os.unlink(url)

    def remove(self, url: str) -> None:
        """Removes a file, or a folder with everything in it, if it exists."""
        path = Path(url)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def make_folder(self, url: str) -> None:
        """Makes a folder and its parents."""
        Path(url).mkdir(parents=True, exist_ok=True)


def _describe_all(paths: Iterable[Path]) -> Iterator[FileInfo]:
    return (info for path in paths if (info := _describe(path)) is not None)


def _describe(path: Path) -> FileInfo | None:
    """Returns the attributes of a path; None if it does not exist, or has just been removed."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    is_dir = stat.S_ISDIR(found.st_mode)
    return FileInfo(str(path), 0 if is_dir else found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}", is_dir)
