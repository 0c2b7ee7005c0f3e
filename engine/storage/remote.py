"""`RemoteFiles`: files behind a URL, through fsspec, with timeouts, checked lengths and retries."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import ConfigError
from ..shown import without_secrets
from .files import FileInfo, StorageOptions
from .retries import TruncatedError, error_code, with_retries

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
}
"""Protocol -> the package that implements it. These stores have no folders: slashes are part of a file's name."""

CREATES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory")
"""Protocols whose package can write a file only if there is none."""

ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "LastModified", "last_modified", "mtime", "updated")
"""Fields of fsspec's file attributes that hold an etag, a hash or a time of change, in order of preference."""

PATTERN_SIGNS = frozenset("*?[")
"""Signs that make fsspec take a name for a pattern."""

PIECE_BYTES = 32 << 20
"""Bytes of one read request; after an error, only the bytes of the failed request are read again."""


class RemoteFiles:
    """The operations of `Files` on URLs of one protocol, through fsspec; transient errors are retried.

    Args:
        protocol: The protocol, such as ``"s3"``.
        options: Settings of the connections to the store.

    Raises:
        ConfigError: The package for the protocol is not installed, or no package implements it.
    """

    def __init__(self, protocol: str, options: StorageOptions) -> None:
        self._protocol = protocol
        self._options = options
        self._fs = _filesystem(protocol, options)

    @property
    def library(self) -> Any:
        """The fsspec file system of the protocol. It does not retry; a caller can use `with_retries`."""
        return self._fs

    def info(self, url: str) -> FileInfo | None:
        """Returns the attributes of a file or folder; None if it does not exist."""
        try:
            return self._describe(self._call("look at", url, lambda: self._fs.info(url)))
        except FileNotFoundError:
            return None

    def children(self, url: str) -> list[FileInfo]:
        """Returns the attributes of the direct children of a folder; an empty list if the folder does not exist."""
        try:
            found = self._call("list", url, lambda: self._fs.ls(url, detail=True))
        except FileNotFoundError:
            return []
        return [one for one in map(self._describe, found) if one.url.rstrip("/") != url.rstrip("/")]

    def walk(self, url: str) -> Iterator[FileInfo]:
        """Yields the attributes of each file in a folder and its subfolders; nothing if the folder does not exist."""
        try:
            found = self._call("list", url, lambda: self._fs.find(url, detail=True))
        except FileNotFoundError:
            return
        yield from map(self._describe, found.values())

    def glob(self, pattern: str) -> list[FileInfo]:
        """Returns the attributes of the files, not folders, whose URL matches a pattern with `*`, `**` and `?`."""
        try:
            found = self._call("list", pattern, lambda: self._fs.glob(pattern, detail=True))
        except FileNotFoundError:
            return []
        return [one for one in map(self._describe, found.values()) if not one.is_dir]

    def read(self, url: str, start: int, end: int | None) -> bytes:
        """Returns the bytes from `start` to before `end`, or to the end; pieces of `PIECE_BYTES` are retried alone."""
        if end is None:
            info = self.info(url)
            if info is None or info.is_dir:
                raise FileNotFoundError(f"no such file: {without_secrets(url)}")
            if info.size is None:  # The store does not give the size, so the length cannot be checked.
                return self._call("read", url, lambda: self._fs.cat_file(url, start=start or None))
            end = info.size
        pieces = [(at, min(at + PIECE_BYTES, end)) for at in range(start, end, PIECE_BYTES)]
        return b"".join(self._read_piece(url, *piece) for piece in pieces)

    def write(self, url: str, data: bytes) -> None:
        """Writes a whole file; object stores replace the old content atomically."""
        if self._protocol not in PACKAGES:
            self.make_folder(url.rpartition("/")[0])
        self._call("write", url, lambda: self._fs.pipe_file(url, data))

    def create(self, url: str, data: bytes) -> bool:
        """Writes a whole file unless there is one; returns whether this call made the file.

        Where the store cannot do this in one request, the file is looked for and then written, with a warning.
        """
        made = self._call("create", url, lambda: self._create(url, data)) if self._protocol in CREATES else None
        if made is None:
            logger.warning("%s:// cannot create a file only once: never start two runs of one output", self._protocol)
            if self.info(url) is not None:
                return False
            self.write(url, data)
        # An earlier attempt, whose answer was lost, may have made the file; and another process may have replaced it.
        return made or self.read(url, 0, None) == data

    def _create(self, url: str, data: bytes) -> bool | None:
        """Sends the request of `create`; returns whether it made the file, None if the store knows no such request."""
        try:
            self._fs.pipe_file(url, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if error_code(error) == "NotImplemented":
                return None
            if error_code(error) not in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
                raise
            return False
        return True

    def move(self, url: str, target: str) -> None:
        """Moves a file to the URL `target`: the store copies the file, and then the file at `url` is removed."""
        if self._protocol not in PACKAGES:
            self.make_folder(target.rpartition("/")[0])
        self._call("copy", url, lambda: self._fs.cp_file(url, target))
        self.remove(url)

    def remove(self, url: str) -> None:
        """Removes a file, or a folder with everything in it, if it exists."""
        info = self.info(url)
        if info is None:
            return
        with contextlib.suppress(FileNotFoundError):  # An earlier attempt, whose answer was lost, has removed it.
            self._call("remove", url, lambda: self._remove(url, info.is_dir))

    def make_folder(self, url: str) -> None:
        """Makes a folder and its parents; does nothing in an object store, which has no folders."""
        if self._protocol not in PACKAGES:
            self._call("make", url, lambda: self._fs.makedirs(url, exist_ok=True))

    def _remove(self, url: str, is_dir: bool) -> None:
        if is_dir and not PATTERN_SIGNS.intersection(url):
            self._fs.rm(url, recursive=True)
            return
        # `rm` would remove every file that the name matches as a pattern.
        for path in self._fs.find(url) if is_dir else [url]:
            self._fs.rm_file(path)

    def _read_piece(self, url: str, start: int, end: int) -> bytes:
        def read() -> bytes:
            data = self._fs.cat_file(url, start=start, end=end)
            if len(data) > end - start:  # An HTTP server without range requests sends the whole file.
                data = data[start:end]
            if len(data) != end - start:
                raise TruncatedError(f"asked for {end - start} bytes from {start} on, got {len(data)}")
            return data

        return self._call("read", url, read)

    def _call(self, action: str, url: str, call: Callable[[], Result]) -> Result:
        return with_retries(call, action, url, self._options.max_attempts)

    def _describe(self, info: dict[str, Any]) -> FileInfo:
        name = info["name"]
        url = name if "://" in name else f"{self._protocol}://{name}"
        etag = next((str(info[key]).strip('"') for key in ETAGS if info.get(key)), "")
        is_dir = info["type"] == "directory"
        return FileInfo(url, 0 if is_dir else info["size"], etag, is_dir)


@functools.cache
def _filesystem(protocol: str, options: StorageOptions) -> Any:
    """Returns the fsspec file system of a protocol; equal arguments give the same object, which holds connections."""
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        if protocol in PACKAGES:
            advice = f"needs a package that is not installed: pip install {PACKAGES[protocol]}"
        elif isinstance(error, ImportError):
            advice = f"needs a package that is not installed: {error}"
        else:
            advice = "is not known; known are s3, gs, abfss, hf and what fsspec has"
        raise ConfigError(f"{protocol}:// {advice}") from error
    # Listings are not cached, because other processes write to the same folders.
    fs = kind(use_listings_cache=False, skip_instance_cache=True, **_arguments(protocol, options))
    if protocol in ("s3", "s3a"):
        fs.retries = 1  # `with_retries` wraps all calls; retries inside of retries would multiply.
    return fs


def _arguments(protocol: str, options: StorageOptions) -> dict[str, Any]:
    """Returns the keyword arguments of a protocol's fsspec class; S3's gets the options."""
    if protocol in ("http", "https"):
        from .http_client import http_client

        return {"get_client": http_client}
    if protocol not in ("s3", "s3a"):
        if options.endpoint_url is not None and protocol in PACKAGES:
            raise ConfigError(f"endpoint_url is for s3:// only, not for {protocol}://")
        return {}
    return {
        "endpoint_url": options.endpoint_url,
        "config_kwargs": {
            "connect_timeout": options.connect_timeout_s,
            "read_timeout": options.read_timeout_s,
            "retries": {"total_max_attempts": 1},
        },
    }
