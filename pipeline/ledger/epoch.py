"""Epochs: writers of a work folder follow on each other, and each knows exactly which records count.

A process that was given up may stay alive for a moment, for example behind a broken connection, and write once more. So
each writer opens an *epoch*. It announces its number, and then lists the records in the folder. For all later writers,
the records that count are this list and the records that this writer adds. A record that a former writer adds later is
in no list and does not count. The new writer did not find its rows done, and runs them again.

A former writer could do harm in one way: it removes flushes that its part has replaced, while the new writer has listed
the flushes and not the commit of the part. So a writer checks, after each commit and before it removes a flush, that
its epoch is still the last one. Either it sees its successor and removes nothing, or the successor listed the folder
after the commit was written.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..files.storage import Storage
from .records import COMMIT, FLUSH

RESULTS = "results"
FAILED = "failed"
KINDS = (RESULTS, FAILED)
"""The folders in a work folder: one for results, and one for dead letters."""

EPOCHS = "epochs"


@dataclass(frozen=True)
class Epoch:
    """The period in which one process writes to a work folder.

    Attributes:
        work: The work folder.
        number: Number of the epoch.
        token: Random text that distinguishes epochs which took the same number at the same moment.
        records: Names of the records of former writers that count.
    """

    work: Storage
    number: int
    token: str
    records: tuple[str, ...]
    _numbers: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    @classmethod
    def open(cls, work: Storage) -> Epoch:
        """Begins the next epoch of a work folder, by a file that announces it and then lists the records that count."""
        former = _list(work)
        number = max(former, default=0) + 1
        token = uuid.uuid4().hex
        file = work / EPOCHS / _file_name(number)
        file.write_bytes(json.dumps({"token": token}).encode())
        # The module's docstring says why flushes come before commits, and both after the announcement.
        there = [f"{kind}/{name}" for suffix in (FLUSH, COMMIT) for kind in KINDS for name in _all(work, kind, suffix)]
        known = _known(work, former)
        records = tuple(sorted(name for name in there if name in known.names or _epoch_of(name) == known.number))
        file.write_bytes(json.dumps({"token": token, "records": records}).encode())
        return cls(work, number, token, records)

    def is_last(self) -> bool:
        """Returns whether this is still the newest epoch of the work folder, so that no other process has begun one."""
        last = max(_list(self.work), default=0)
        return last == self.number and _read(self.work, last).get("token") == self.token

    def next_name(self, kind: str) -> str:
        """Returns a name for a record or a part of `kind`, without a suffix, that no other call returns."""
        return f"{kind}/{self.number:06}-{next(self._numbers):06}"


@dataclass(frozen=True)
class _Known:
    """The number of the last epoch that may have written records, and the names of the earlier records it listed."""

    number: int
    names: frozenset[str]


def _known(work: Storage, numbers: list[int]) -> _Known:
    """Finds the last of the numbered epochs that listed earlier records. An epoch without a list wrote no record."""
    for number in sorted(numbers, reverse=True):
        about = _read(work, number)
        if "records" in about:
            return _Known(number, frozenset(about["records"]))
    return _Known(0, frozenset())


def _list(work: Storage) -> list[int]:
    return [int(one.name.partition(".")[0]) for one in (work / EPOCHS).list(".json") if one.name[0] != "."]


def _all(work: Storage, kind: str, suffix: str) -> list[str]:
    return [one.name for one in (work / kind).list(suffix) if one.name[0] != "."]


def _read(work: Storage, number: int) -> dict[str, Any]:
    return json.loads((work / EPOCHS / _file_name(number)).read_bytes())


def _file_name(number: int) -> str:
    return f"{number:06}.json"


def _epoch_of(name: str) -> int:
    return int(name.rpartition("/")[2].partition("-")[0])
