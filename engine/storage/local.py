"""`LocalFiles`: files of this machine."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import ConfigError
from .files import FileInfo

DRAFT = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
"""Names of drafts: files that a process writes before it renames them. A process that is killed leaves its draft."""


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
        refuse_special(url)
        with open(url, "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def write(self, url: str, data: bytes, mode: int = 0o666) -> None:
        """Writes a whole file atomically and durably, by renaming a complete temporary file; makes its parents."""
        with _draft(Path(url), data, mode) as draft:
            draft.replace(url)
        sync_folder(Path(url).parent)

    def create(self, url: str, data: bytes) -> bool:
        """Writes a whole file unless there is one, atomically and durably; returns whether this call made the file."""
        with _draft(Path(url), data) as draft:
            try:
                os.link(draft, url)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                if not _create_without_links(url, data):
                    return False
        sync_folder(Path(url).parent)
        return True

    def move(self, url: str, target: str) -> None:
        """Moves a file to the path `target` durably, replaces a file that is there, and makes its parent folders."""
        _make_folder(Path(target).parent)
        try:
            os.replace(url, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self.write(target, Path(url).read_bytes())
            os.unlink(url)
        for folder in {Path(target).parent, Path(url).parent}:
            sync_folder(folder)

    def remove(self, url: str) -> None:
        """Removes a file, or a folder with everything in it, if it exists."""
        path = Path(url)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def make_folder(self, url: str) -> None:
        """Makes a folder and its parents."""
        _make_folder(Path(url))


def refuse_special(url: str) -> None:
    """Raises `ConfigError` if a path leads to neither a file nor a folder: opening a pipe may wait for ever."""
    mode = os.stat(url).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ConfigError(f"{url!r} is a pipe, a socket or a device; pass a file")


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the system can: without this, a crash may undo a rename."""
    with contextlib.suppress(OSError):  # Some file systems cannot, and Windows opens no folder.
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _make_folder(folder: Path) -> None:
    """Makes a folder and its parents durably."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        sync_folder(one.parent)


@contextlib.contextmanager
def _draft(path: Path, data: bytes, mode: int = 0o666) -> Iterator[Path]:
    """Writes a durable draft beside a path, which is removed at the end if it has not been renamed."""
    _make_folder(path.parent)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(draft, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _create_without_links(url: str, data: bytes) -> bool:
    """Makes a file on a file system that has no links. A reader may see it before it is whole."""
    try:
        opened = os.open(url, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(opened, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return True


def _describe_all(paths: Iterable[Path]) -> Iterator[FileInfo]:
    return (info for path in paths if (info := _describe(path)) is not None)


def _describe(path: Path) -> FileInfo | None:
    """Returns the attributes of a path; None if it does not exist, has just been removed, or cannot exist."""
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return None
        raise
    is_dir = stat.S_ISDIR(found.st_mode)
    return FileInfo(str(path), 0 if is_dir else found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}", is_dir)
