"""Writes a large file, local or remote, that appears only when it is whole: `whole_file`."""

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
"""Number of pieces after which the size of a piece doubles, because S3 accepts at most 10,000 pieces."""


class Writable(Protocol):
    """An object with a `write` method for bytes."""

    def write(self, data: bytes) -> Any:
        """Appends bytes."""
        ...


@contextmanager
def whole_file(target: Storage) -> Iterator[Writable]:
    """Opens a file for writing. The file appears when the `with` block ends; if the block raises, it does not appear.

    Args:
        target: The file; an existing file is replaced.
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
    """Opens a file under a temporary name and renames it at the end, because not every store can upload in pieces."""
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
    """A multipart upload to S3. Each piece is retried by itself; the file appears when `finish` returns.

    Args:
        target: The file, at an ``s3://`` URL.
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
        """Appends bytes to a buffer, and uploads the buffer as a piece when it has reached the size of a piece."""
        self._buffer += data
        self._num_bytes += len(data)
        if len(self._buffer) >= PIECE_BYTES << (len(self._pieces) // MAX_PIECES_BEFORE_GROWTH):
            self._send()

    def finish(self) -> None:
        """Sends the last piece, and completes the upload, so that the file appears."""
        if self._buffer or not self._pieces:
            self._send()
        try:
            self._call("complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": self._pieces})
        except (StorageError, FileNotFoundError):
            # An earlier attempt may have completed the upload although its answer was lost; then the file is whole.
            if self._target.info() is None or self._target.size() != self._num_bytes:
                raise

    def abort(self) -> None:
        """Cancels the upload, so that S3 deletes its pieces."""
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
