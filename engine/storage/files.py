"""What every kind of storage can do, and the settings of those that are far away."""

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
    """How to reach files behind a URL. Credentials are none of them: they come from the environment.

    Attributes:
        endpoint_url: Of an S3-compatible store, e.g. ``"http://minio:9000"``; None for what ``AWS_ENDPOINT_URL`` or
            ``AWS_ENDPOINT_URL_S3`` says, else Amazon's.
        connect_timeout_s: Longest wait for a connection.
        read_timeout_s: Longest silence within an answer; 30 unless ``MILLRACE_STORAGE_TIMEOUT_S`` says otherwise.
        max_attempts: Times a request is tried in all, when what fails may pass.
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
    """What a store says of a file or a folder.

    Attributes:
        url: Where it is.
        size: In bytes; 0 of a folder, None where the store does not say.
        etag: Changes when the content does.
        is_dir: Whether it is a folder.
    """

    url: str
    size: int | None
    etag: str
    is_dir: bool


class Files(Protocol):
    """A kind of storage. Every method takes URLs of this kind; a missing file is a `FileNotFoundError`."""

    def info(self, url: str) -> FileInfo | None:
        """Describes a file or folder; None if there is none."""
        ...

    def children(self, url: str) -> list[FileInfo]:
        """Describes what is directly in a folder; nothing if there is no such folder."""
        ...

    def walk(self, url: str) -> Iterator[FileInfo]:
        """Describes every file below a folder."""
        ...

    def glob(self, pattern: str) -> list[FileInfo]:
        """Describes the files that a pattern with `*`, `**` and `?` finds."""
        ...

    def read(self, url: str, start: int, end: int | None) -> bytes:
        """Returns the bytes from start to end, or to the file's end."""
        ...

    def write(self, url: str, data: bytes) -> None:
        """Makes or replaces a file: a reader sees the old one whole, or the new one."""
        ...

    def move(self, url: str, target: str) -> None:
        """Gives a file another name, replacing what has it."""
        ...

    def remove(self, url: str) -> None:
        """Removes a file, or a folder with all below it, if it is there."""
        ...

    def make_folder(self, url: str) -> None:
        """Makes a folder and those above it, where the store has folders."""
        ...
