"""`RangeFile`: a file behind a URL as a Python file object, in which every read requests a range of bytes."""

from __future__ import annotations

import io

from .files import Files


class RangeFile(io.RawIOBase):
    """A file of known size, open for reading at any position; each read requests a range of its bytes.

    Args:
        files: Storage of the file.
        url: URL of the file.
        size: Size in bytes.
    """

    def __init__(self, files: Files, url: str, size: int) -> None:
        super().__init__()
        self._files = files
        self._url = url
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        """Returns True: the file is open for reading."""
        return True

    def seekable(self) -> bool:
        """Returns True: `seek` can set any position."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the position of the next read, which may be past the end, and returns it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """Returns the position of the next read, in bytes from the start of the file."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Reads the next bytes into the buffer, as many as fit, and returns their number; 0 at the end of the file."""
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._files.read(self._url, self._at, end)
        buffer[: len(data)] = data
        self._at = end
        return len(data)
