"""A large file written piece by piece that appears when it is whole, here or behind a URL."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ...engine.errors import StorageError
from ...engine.storage import RemoteFiles
from ...engine.storage.retries import with_retries
from ..files.storage import Storage

PIECE_BYTES = 16 << 20
MAX_PIECES_BEFORE_GROWTH = 1000
"""S3 takes 10,000 pieces: after so many of one size, they double."""


class Writable(Protocol):
    """What takes bytes."""

    def write(self, data: bytes) -> Any:
        """Takes the next bytes."""
        ...


@contextmanager
def whole_file(target: Storage) -> Iterator[Writable]:
    """Opens a file for writing that appears at the end of the block, if nothing was raised in it.

    Args:
        target: The file; one that is there is replaced.
    """
    opened = _local_file if target.is_local else _s3_file if target.protocol in ("s3", "s3a") else _remote_file
    with opened(target) as file:
        yield file


@contextmanager
def _local_file(target: Storage) -> Iterator[Writable]:
    path = Path(target.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with ExitStack() as clean:
        clean.callback(draft.unlink, missing_ok=True)
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)


@contextmanager
def _remote_file(target: Storage) -> Iterator[Writable]:
    """Writes under another name and gives the file its own at the end: not all stores know pieces."""
    draft = Storage.at(f"{target.url}.{uuid.uuid4().hex[:12]}.tmp", options=target.options)
    library = RemoteFiles(draft.protocol, draft.options).library
    with ExitStack() as clean:
        clean.callback(draft.remove)
        with library.open(draft.url, "wb") as file:
            yield file
        draft.move_to(target)


@contextmanager
def _s3_file(target: Storage) -> Iterator[Writable]:
    upload = S3Upload(target)
    try:
        yield upload
        upload.finish()
    except BaseException:
        upload.abort()
        raise


class S3Upload:
    """A file sent to S3 in pieces, each tried again by itself when the store fails; it appears with the last.

    Args:
        target: The file.
    """

    def __init__(self, target: Storage) -> None:
        self._target = target
        self._library = RemoteFiles(target.protocol, target.options).library
        bucket, _, key = target.url.partition("://")[2].partition("/")
        self._where = {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._pieces: list[dict[str, Any]] = []
        self._num_bytes = 0
        self._id = self._call("create_multipart_upload")["UploadId"]

    def write(self, data: bytes) -> None:
        """Takes the next bytes."""
        self._buffer += data
        self._num_bytes += len(data)
        if len(self._buffer) >= PIECE_BYTES << (len(self._pieces) // MAX_PIECES_BEFORE_GROWTH):
            self._send()

    def finish(self) -> None:
        """Sends what is left, and lets the file appear."""
        if self._buffer or not self._pieces:
            self._send()
        try:
            self._call("complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": self._pieces})
        except (StorageError, FileNotFoundError):
            # An attempt whose answer was lost had done it: then the upload is no more, and the file is there.
            if self._target.info() is None or self._target.size() != self._num_bytes:
                raise

    def abort(self) -> None:
        """Drops what was sent."""
        self._call("abort_multipart_upload", UploadId=self._id)

    def _send(self) -> None:
        number = len(self._pieces) + 1
        answer = self._call("upload_part", UploadId=self._id, PartNumber=number, Body=bytes(self._buffer))
        self._pieces.append({"PartNumber": number, "ETag": answer["ETag"]})
        self._buffer.clear()

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        def call() -> dict[str, Any]:
            return self._library.call_s3(method, **self._where, **arguments)

        return with_retries(call, "write", self._target.url, self._target.options.max_attempts)
