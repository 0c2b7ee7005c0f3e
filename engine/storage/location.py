"""`Location`: a file or a folder, named by a path or a URL."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Self, cast
from urllib.parse import unquote, urlsplit

from ..errors import ConfigError, quote
from ..shown import without_secrets
from .files import FileInfo, Files, StorageOptions
from .local import LocalFiles, refuse_special
from .range_file import RangeFile
from .remote import RemoteFiles

BUFFER_BYTES = 1 << 20
"""Least number of bytes of one request for a file behind a URL."""


@dataclass(frozen=True, slots=True)
class Location:
    """A file or a folder, which need not exist yet. Constructing it sends no request.

    A request that fails with a transient error is repeated after a wait. A missing bucket and a missing or wrong
    credential raise `ConfigError`, a store that keeps failing raises `StorageError`, and a missing file raises
    `FileNotFoundError`.

    Attributes:
        url: A path of this machine, or a URL such as ``"s3://bucket/folder"``.
        options: Settings of the connections to the store behind a URL.
    """

    url: str
    options: StorageOptions = field(default_factory=StorageOptions)

    @classmethod
    def at(cls, url: str | Path, endpoint_url: str | None = None, options: StorageOptions | None = None) -> Self:
        """Makes a location from a path or a URL.

        Args:
            url: A path, where ``~`` is the home folder, or a URL.
            endpoint_url: URL of an S3-compatible store; overrides `options.endpoint_url`.
            options: Settings of the connections to the store behind a URL; None for the defaults.
        """
        options = options or StorageOptions()
        if endpoint_url is not None:
            options = replace(options, endpoint_url=endpoint_url)
        return cls(_normalise(str(url)), options)

    def __truediv__(self, name: str) -> Self:
        """Returns the location of the file or folder `name` in this folder."""
        return replace(self, url=f"{self.url.rstrip('/')}/{name}" if self.url != "/" else f"/{name}")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({without_secrets(self.url)!r})"

    @property
    def name(self) -> str:
        """The last part of the path or URL: the name of the file or folder."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        """Whether the location is on this machine."""
        return "://" not in self.url

    @property
    def protocol(self) -> str:
        """The part of the URL before ``://``; empty for a path."""
        return self.url.partition("://")[0] if "://" in self.url else ""

    @property
    def files(self) -> Files:
        """The object that performs the operations on this location's kind of storage.

        Raises:
            ConfigError: The package for this URL's protocol is not installed, or the protocol is unknown.
        """
        return LocalFiles() if self.is_local else RemoteFiles(self.protocol, self.options)

    def info(self) -> FileInfo | None:
        """Returns the attributes of the file or folder; None if neither exists here."""
        return self.files.info(self.url)

    def exists(self) -> bool:
        """Returns whether a file or a folder exists here."""
        return self.info() is not None

    def is_dir(self) -> bool:
        """Returns whether a folder exists here; in an object store, whether any name begins with this one."""
        info = self.info()
        return info is not None and info.is_dir

    def size(self) -> int:
        """Returns the size of the file in bytes; if the store does not give it, the whole file is read."""
        size = self._file_info().size
        return len(self.read_bytes()) if size is None else size

    def etag(self) -> str:
        """Returns a text that changes when the content of the file changes; empty if the store gives none."""
        return self._file_info().etag

    def list(self, suffix: str = "") -> Sequence[Self]:
        """Returns the files and folders directly in this folder, sorted by URL; nothing if the folder does not exist.

        Args:
            suffix: Only names with this ending are returned.
        """
        return self._sorted(self.files.children(self.url), suffix)

    def walk(self, suffix: str = "") -> Sequence[Self]:
        """Returns all files in this folder and its subfolders whose names end with `suffix`, sorted by URL."""
        return self._sorted(self.files.walk(self.url), suffix)

    def read_bytes(self, start: int = 0, end: int | None = None) -> bytes:
        """Returns the bytes of the file from `start` to before `end`, by default all bytes."""
        return self.files.read(self.url, start, end)

    def read_text(self) -> str:
        """Returns the content of a UTF-8 file as text."""
        return self.read_bytes().decode("utf-8")

    def open_input(self, buffer_bytes: int = BUFFER_BYTES, size: int | None = None) -> BinaryIO:
        """Returns a binary file object that reads the file at any position.

        Args:
            buffer_bytes: Least number of bytes of one request, for a file behind a URL.
            size: Size of the file in bytes; None asks the store for it.
        """
        if self.is_local:
            refuse_special(self.url)
            return open(self.url, "rb")
        size = self._file_info().size if size is None else size
        if size is None:  # The store does not give the size, so ranges of bytes cannot be requested.
            return io.BytesIO(self.read_bytes())
        return cast("BinaryIO", io.BufferedReader(RangeFile(self.files, self.url, size), buffer_bytes))

    def write_bytes(self, data: bytes) -> None:
        """Writes the whole file and makes its parents. A reader sees the old content or the new, never a mixture."""
        self.files.write(self.url, data)

    def create(self, data: bytes) -> bool:
        """Writes the whole file unless there is one, and returns whether this call made it: of several, one does."""
        return self.files.create(self.url, data)

    def move_to(self, other: Location) -> None:
        """Renames the file to another location in the same store, replacing any file there."""
        self.files.move(self.url, other.url)

    def remove(self) -> None:
        """Removes the file, or the folder with everything in it, if it exists."""
        self.files.remove(self.url)

    def make_folder(self) -> None:
        """Makes the folder and its parents; does nothing in an object store, which has no folders."""
        self.files.make_folder(self.url)

    def _file_info(self) -> FileInfo:
        info = self.info()
        if info is None or info.is_dir:
            url = without_secrets(self.url)
            raise FileNotFoundError(f"{url} is {'no file' if info is None else 'a folder, not a file'}")
        return info

    def _sorted(self, found: Iterable[FileInfo], suffix: str) -> Sequence[Self]:
        return [replace(self, url=url) for url in sorted(one.url for one in found) if url.endswith(suffix)]


def _normalise(url: str) -> str:
    """Turns a ``file://`` URL into a path, and removes a slash at the end."""
    if "\0" in url:
        raise ConfigError(f"a path or a URL cannot hold a zero byte; got {quote(url)}")
    if url.startswith("file://"):
        url = unquote(urlsplit(url).path)
    if "://" not in url:
        try:
            return str(Path(url).expanduser())
        except RuntimeError as error:
            raise ConfigError(f"the home folder in {quote(url)} is not known; write out the path") from error
    return url.rstrip("/")
