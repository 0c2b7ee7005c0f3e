"""`Files`, the operations of every kind of storage, and `StorageOptions`, the settings of remote storage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ..env import STORAGE_TIMEOUT, storage_timeout
from ..errors import ConfigError
from ..shown import has_user


def _default_timeout_s() -> float:
    given = storage_timeout()
    try:
        return 30.0 if given is None else float(given)
    except ValueError:
        raise ConfigError(f"{STORAGE_TIMEOUT} must be a number of seconds; got {given!r}") from None


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """The settings of connections to the store behind a URL. Credentials come from the environment.

    Attributes:
        endpoint_url: URL of an S3-compatible store, e.g. ``"http://minio:9000"``. None for the value of
            ``AWS_ENDPOINT_URL`` or ``AWS_ENDPOINT_URL_S3``, or else Amazon's store.
        connect_timeout_s: Longest wait for a connection, in seconds.
        read_timeout_s: Longest silence within an answer, in seconds; by default ``MILLRACE_STORAGE_TIMEOUT_S`` or 30.
        max_attempts: Most attempts of a request, the first one included, while its errors are transient.
    """

    endpoint_url: str | None = None
    connect_timeout_s: float = 10.0
    read_timeout_s: float = field(default_factory=_default_timeout_s)
    max_attempts: int = 10

    def __post_init__(self) -> None:
        if self.endpoint_url is not None and not self.endpoint_url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint_url must begin with http:// or https://; got {self.endpoint_url!r}")
        if self.endpoint_url is not None and has_user(self.endpoint_url):
            raise ConfigError(
                f"endpoint_url holds a user or a password: {self.endpoint_url!r}; set them in the environment, as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        for name in ("connect_timeout_s", "read_timeout_s", "max_attempts"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be greater than 0; got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """The attributes of a file or a folder in a store.

    Attributes:
        url: Path or URL.
        size: Size in bytes; 0 for a folder, None if the store does not give it.
        etag: Text that changes when the content changes; empty if the store gives none.
        is_dir: Whether the URL is a folder.
    """

    url: str
    size: int | None
    etag: str
    is_dir: bool


class Files(Protocol):
    """The operations of one kind of storage, on URLs of that kind. A missing file raises `FileNotFoundError`."""

    def info(self, url: str) -> FileInfo | None:
        """Returns the attributes of a file or folder; None if it does not exist."""
        ...

    def children(self, url: str) -> list[FileInfo]:
        """Returns the attributes of the direct children of a folder; an empty list if the folder does not exist."""
        ...

    def walk(self, url: str) -> Iterator[FileInfo]:
        """Yields the attributes of each file in a folder and its subfolders; nothing if the folder does not exist."""
        ...

    def glob(self, pattern: str) -> list[FileInfo]:
        """Returns the attributes of the files, not folders, whose URL matches a pattern with `*`, `**` and `?`."""
        ...

    def read(self, url: str, start: int, end: int | None) -> bytes:
        """Returns the bytes from `start` to before `end`, or to the end of the file."""
        ...

    def write(self, url: str, data: bytes) -> None:
        """Writes a whole file atomically: a reader sees either the old content or the new content."""
        ...

    def create(self, url: str, data: bytes) -> bool:
        """Writes a whole file unless there is one; returns whether this call made the file."""
        ...

    def move(self, url: str, target: str) -> None:
        """Moves a file to the URL `target` in the same storage, and replaces a file that is there."""
        ...

    def remove(self, url: str) -> None:
        """Removes a file, or a folder with everything in it, if it exists."""
        ...

    def make_folder(self, url: str) -> None:
        """Makes a folder and its parents; does nothing in an object store, which has no folders."""
        ...
