"""Writes a large file, local or remote, that appears only when it is whole: `whole_file`.

A process that is killed while it writes leaves a draft, which `remove_drafts` finds by its name.
"""

from __future__ import annotations

import functools
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ...engine.errors import ConfigError, StorageError
from ...engine.storage import RemoteFiles
from ...engine.storage.local import DRAFT
from ...engine.storage.retries import with_retries
from ..files.storage import Storage

S3 = ("s3", "s3a")

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
    opened = _local_file if target.is_local else _s3_file if target.protocol in S3 else _remote_file
    with opened(target) as file:
        yield file


def remove_drafts(target: Storage) -> None:
    """Removes what processes that were killed have left of a file. No other process may write the file at this time.

    Args:
        target: The file.
    """
    if target.protocol in S3:
        S3Upload.abort_all(target)
        return
    folder = Storage.at(target.url.rpartition("/")[0], options=target.options)
    for one in folder.list(".tmp"):
        if one.name.startswith(f".{target.name}.") and DRAFT.fullmatch(one.name):
            one.remove()


def _draft_of(target: Storage) -> Storage:
    folder, slash, name = target.url.rpartition("/")
    return Storage.at(f"{folder}{slash}.{name}.{uuid.uuid4().hex[:12]}.tmp", options=target.options)


@contextmanager
def _local_file(target: Storage) -> Iterator[Writable]:
    Path(target.url).parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(target)
    with ExitStack() as clean:
        clean.callback(draft.remove)
        with open(draft.url, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.move_to(target)


@contextmanager
def _remote_file(target: Storage) -> Iterator[Writable]:
    """Opens a file of this machine, and uploads it at the end: an upload that fails can then be repeated as a whole.

    The upload has a temporary name, because a reader of some stores sees a file before it is whole.
    """
    draft = _draft_of(target)
    library = RemoteFiles(draft.protocol, draft.options).library
    with ExitStack() as clean, tempfile.NamedTemporaryFile() as file:
        yield file
        file.flush()
        clean.callback(draft.remove)
        upload = functools.partial(library.put_file, file.name, draft.url)
        with_retries(upload, "write", target.url, target.options.max_attempts)
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
        self._buffer = bytearray()
        self._pieces: list[dict[str, Any]] = []
        self._num_bytes = 0
        self._id = self._call("create_multipart_upload")["UploadId"]

    @staticmethod
    def abort_all(target: Storage) -> None:
        """Cancels all uploads of a file, as far as the store lets this process see and cancel them."""
        where = _bucket_and_key(target)
        with suppress(ConfigError, StorageError):
            found = _call_s3(target, "list_multipart_uploads", Bucket=where["Bucket"], Prefix=where["Key"])
            for one in found.get("Uploads", ()):
                if one["Key"] == where["Key"]:
                    _call_s3(target, "abort_multipart_upload", **where, UploadId=one["UploadId"])

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
        return _call_s3(self._target, method, **_bucket_and_key(self._target), **arguments)


def _call_s3(target: Storage, method: str, **arguments: Any) -> dict[str, Any]:
    library = RemoteFiles(target.protocol, target.options).library
    call = functools.partial(library.call_s3, method, **arguments)
    return with_retries(call, "write", target.url, target.options.max_attempts)


def _bucket_and_key(target: Storage) -> dict[str, str]:
    bucket, _, key = target.url.partition("://")[2].partition("/")
    return {"Bucket": bucket, "Key": key}
