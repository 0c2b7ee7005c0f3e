"""Which of many keys came before: exact, in the order they came, in little memory.

Keys are known by a hash of 128 bits. Beyond a buffer they are spread over files by the first byte of the hash, and each
file is sorted by itself: 100 million keys take 2.4 GB of disk and a few tens of MB of memory.
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
    """Takes keys with the places they stand at, and tells the places of those that have come before.

    Args:
        folder: An empty folder for what does not fit the buffer.
        buffered_records: Keys held in memory.
    """

    def __init__(self, folder: Path, buffered_records: int = BUFFERED_RECORDS) -> None:
        self._folder = folder
        self._limit = buffered_records * RECORD.itemsize
        self._buffer = bytearray()

    def add(self, key: str, place: int) -> None:
        """Takes a key.

        Args:
            key: The key.
            place: Where it stands; larger than those before.
        """
        self._buffer += hashlib.blake2b(key.encode(), digest_size=16).digest() + _PLACE.pack(place)
        if len(self._buffer) >= self._limit:
            self._spill()

    def places(self) -> np.ndarray:
        """Returns the places of all keys but the first of each kind, ascending, as uint64."""
        if not any(self._folder.iterdir()):
            return np.sort(_later_places(np.frombuffer(bytes(self._buffer), RECORD)))
        self._spill()
        files = sorted(self._folder.iterdir())
        return np.sort(np.concatenate([_later_places(np.fromfile(file, RECORD)) for file in files]))

    def _spill(self) -> None:
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
    """Returns the places of the records whose key an earlier one has."""
    ordered = records[np.lexsort((records["place"], records["low"], records["high"]))]
    same = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
    return ordered["place"][1:][same]
