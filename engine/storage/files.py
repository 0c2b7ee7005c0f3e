"""`Files`, the operations of every kind of storage, and `StorageOptions`, the settings of remote storage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ..env import STORAGE_TIMEOUT, storage_timeout
from ..errors import ConfigError


def _default_timeout_s() -> float:
    given = storage_timeout()
    try:
        return 30.0 if given is None else float(given)
    except ValueError:
        raise ConfigError(f"{STORAGE_TIMEOUT} must be a number of seconds; got {given!r}") from None


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """Settings with which files behind a URL are reached. Credentials come from the environment.

    Attributes:
        endpoint_url: URL of an S3-compatible store, e.g. ``"http://minio:9000"``. None for the value of
            ``AWS_ENDPOINT_URL`` or ``AWS_ENDPOINT_URL_S3``, or else Amazon's store.
        connect_timeout_s: Longest wait for a connection.
        read_timeout_s: Longest silence within an answer; the default is ``MILLRACE_STORAGE_TIMEOUT_S``, or else 30.
        max_attempts: Most attempts of a request whose errors are transient.
    """

    endpoint_url: str | None = None
    connect_timeout_s: float = 10.0
    read_timeout_s: float = field(default_factory=_default_timeout_s)
    max_attempts: int = 10

    def __post_init__(self) -> None:
        if self.endpoint_url is not None and not self.endpoint_url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint_url must begin with http:// or https://; got {self.endpoint_url!r}")
        for name in ("connect_timeout_s", "read_timeout_s", "max_attempts"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be greater than 0; got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """The attributes of a file or a folder in a store.

    Attributes:
        url: Path or URL.
        size: Size in bytes; 0 for a folder, None if the store does not give it.
        etag: Text that changes when the content changes.
        is_dir: Whether it is a folder.
    """

    url: str
    size: int | None
    etag: str
    is_dir: bool


class Files(Protocol):
    """A kind of storage. Every method takes URLs of this kind, and raises `FileNotFoundError` for a missing file."""

    def info(self, url: str) -> FileInfo | None:
        """Describes a file or folder; returns None if it does not exist."""
        ...

    def children(self, url: str) -> list[FileInfo]:
        """Describes the direct children of a folder; returns none if the folder does not exist."""
        ...

    def walk(self, url: str) -> Iterator[FileInfo]:
        """Describes every file below a folder."""
        ...

    def glob(self, pattern: str) -> list[FileInfo]:
        """Describes the files that match a pattern with `*`, `**` and `?`."""
        ...

    def read(self, url: str, start: int, end: int | None) -> bytes:
        """Returns the bytes from `start` to before `end`, or to the end of the file."""
        ...

    def write(self, url: str, data: bytes) -> None:
        """Writes a whole file atomically: a reader sees either the old content or the new content."""
        ...

    def move(self, url: str, target: str) -> None:
        """Renames a file, replacing any file of that name."""
        ...

    def remove(self, url: str) -> None:
        """Removes a file, or a folder with everything in it, if it exists."""
        ...

    def make_folder(self, url: str) -> None:
        """Makes a folder and its parents, in a store that has folders."""
        ...
