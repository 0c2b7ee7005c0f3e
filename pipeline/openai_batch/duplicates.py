"""Finds repeated keys among hundreds of millions in little memory: `DuplicateFinder`.

The finder keeps a hash of 128 bits of each key. A full buffer is spread over files by the first byte of the hash, so
that equal keys meet in one file, and each file is sorted by itself: 100 million keys take 2.4 GB of disk and a few tens
of MB of memory.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u8")])
BUFFERED_RECORDS = 1 << 20
NUM_FILES = 256

_PLACE = struct.Struct("<Q")


class DuplicateFinder:
    """Collects keys with their places, and returns the places of the keys that repeat an earlier key.

    Args:
        folder: An empty folder for the keys that do not fit the buffer.
        buffered_records: Most keys held in memory.
    """

    def __init__(self, folder: Path, buffered_records: int = BUFFERED_RECORDS) -> None:
        self._folder = folder
        self._limit = buffered_records * RECORD.itemsize
        self._buffer = bytearray()

    def add(self, key: str, place: int) -> None:
        """Adds a key, of which the finder keeps a hash and the place.

        Args:
            key: The key.
            place: Place of the key, such as an offset in a file; larger than every place added before.
        """
        self._buffer += hashlib.blake2b(key.encode(), digest_size=16).digest() + _PLACE.pack(place)
        if len(self._buffer) >= self._limit:
            self._spill()

    def places(self) -> np.ndarray:
        """Returns the places of all keys that equal an earlier key, ascending, as uint64."""
        if not any(self._folder.iterdir()):
            return np.sort(_later_places(np.frombuffer(bytes(self._buffer), RECORD)))
        self._spill()
        files = sorted(self._folder.iterdir())
        return np.sort(np.concatenate([_later_places(np.fromfile(file, RECORD)) for file in files]))

    def _spill(self) -> None:
        """Appends the buffered records to `NUM_FILES` files by the first byte of their hash, and empties the buffer."""
        records = np.frombuffer(bytes(self._buffer), RECORD)
        self._buffer.clear()
        bucket = records["high"] % NUM_FILES
        order = np.argsort(bucket, kind="stable")
        starts = np.searchsorted(bucket[order], np.arange(NUM_FILES + 1))
        for number in range(NUM_FILES):
            part = records[order[starts[number] : starts[number + 1]]]
            if len(part):
                with (self._folder / f"{number:03}").open("ab") as file:
                    file.write(part.tobytes())


def _later_places(records: np.ndarray) -> np.ndarray:
    """Returns the places of the records whose hash equals the hash of a record at an earlier place."""
    ordered = records[np.lexsort((records["place"], records["low"], records["high"]))]
    same = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
    return ordered["place"][1:][same]
