"""A place named by a path or a URL."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Self, cast
from urllib.parse import unquote, urlsplit

from .files import FileInfo, Files, StorageOptions
from .local import LocalFiles
from .range_file import RangeFile
from .remote import RemoteFiles

BUFFER_BYTES = 1 << 20
"""What a file behind a URL is read in, at least."""


@dataclass(frozen=True, slots=True)
class Location:
    """A file or a folder, which need not exist yet. Nothing is asked of a store before a method needs it.

    Transient faults of a store are waited for and tried again. A missing bucket and a missing or wrong credential are a
    `ConfigError`, a store that keeps failing is a `StorageError`, a missing file is a `FileNotFoundError`.

    Attributes:
        url: A path of this machine, or a URL such as ``"s3://bucket/folder"``.
        options: How to reach what is behind a URL.
    """

    url: str
    options: StorageOptions = field(default_factory=StorageOptions)

    @classmethod
    def at(cls, url: str | Path, endpoint_url: str | None = None, options: StorageOptions | None = None) -> Self:
        """Names a place.

        Args:
            url: A path, where ``~`` is the home folder, or a URL.
            endpoint_url: Of an S3-compatible store; counts before the one in `options`.
            options: How to reach what is behind a URL.
        """
        options = options or StorageOptions()
        if endpoint_url is not None:
            options = replace(options, endpoint_url=endpoint_url)
        return cls(_normalise(str(url)), options)

    def __truediv__(self, name: str) -> Self:
        """Names a place below this one."""
        return replace(self, url=f"{self.url.rstrip('/')}/{name}" if self.url != "/" else f"/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        """Whether it is of this machine."""
        return "://" not in self.url

    @property
    def protocol(self) -> str:
        """What stands before ``://``; empty for a path."""
        return self.url.partition("://")[0] if "://" in self.url else ""

    @property
    def files(self) -> Files:
        """The storage that it is in.

        Raises:
            ConfigError: The package that knows this kind of URL is not installed.
        """
        return LocalFiles() if self.is_local else RemoteFiles(self.protocol, self.options)

    def info(self) -> FileInfo | None:
        """Returns size, etag and kind; None if nothing is there."""
        return self.files.info(self.url)

    def exists(self) -> bool:
        """Whether a file or a folder is there."""
        return self.info() is not None

    def is_dir(self) -> bool:
        """Whether a folder is there; in an object store, whether any name begins with it."""
        info = self.info()
        return info is not None and info.is_dir

    def size(self) -> int:
        """Returns the file's size in bytes."""
        size = self._file_info().size
        return len(self.read_bytes()) if size is None else size

    def etag(self) -> str:
        """Returns what changes when the file's content does."""
        return self._file_info().etag

    def list(self, suffix: str = "") -> Sequence[Self]:
        """Returns the files and folders directly in this folder, sorted; none if there is no such folder.

        Args:
            suffix: What their names end with.
        """
        return self._sorted(self.files.children(self.url), suffix)

    def walk(self, suffix: str = "") -> Sequence[Self]:
        """Returns all files below this folder, sorted."""
        return self._sorted(self.files.walk(self.url), suffix)

    def read_bytes(self, start: int = 0, end: int | None = None) -> bytes:
        """Returns the content, or the bytes from `start` to before `end`."""
        return self.files.read(self.url, start, end)

    def read_text(self) -> str:
        """Returns the content, which is UTF-8."""
        return self.read_bytes().decode("utf-8")

    def open_input(self, buffer_bytes: int = BUFFER_BYTES, size: int | None = None) -> BinaryIO:
        """Opens the file for reading at any place.

        Args:
            buffer_bytes: What one request asks for, at least, when the file is behind a URL.
            size: Of the file, if it is known; else the store is asked.
        """
        if self.is_local:
            return open(self.url, "rb")
        size = self._file_info().size if size is None else size
        if size is None:  # The store does not say, so places cannot be asked for.
            return io.BytesIO(self.read_bytes())
        return cast("BinaryIO", io.BufferedReader(RangeFile(self.files, self.url, size), buffer_bytes))

    def write_bytes(self, data: bytes) -> None:
        """Makes or replaces the file, and the folders above it: a reader sees the old one whole, or the new one."""
        self.files.write(self.url, data)

    def move_to(self, other: Location) -> None:
        """Gives the file the name of another place in the same store, replacing what is there."""
        self.files.move(self.url, other.url)

    def remove(self) -> None:
        """Removes the file, or the folder with all below it, if it is there."""
        self.files.remove(self.url)

    def make_folder(self) -> None:
        """Makes the folder and those above it; an object store has none to make."""
        self.files.make_folder(self.url)

    def _file_info(self) -> FileInfo:
        info = self.info()
        if info is None or info.is_dir:
            raise FileNotFoundError(f"{self.url} is {'no file' if info is None else 'a folder, not a file'}")
        return info

    def _sorted(self, found: Iterable[FileInfo], suffix: str) -> Sequence[Self]:
        return [replace(self, url=url) for url in sorted(one.url for one in found) if url.endswith(suffix)]


def _normalise(url: str) -> str:
    """Makes a path of a URL of a file, and drops the slash at the end."""
    if url.startswith("file://"):
        url = unquote(urlsplit(url).path)
    if "://" not in url:
        return str(Path(url).expanduser())
    return url.rstrip("/")
