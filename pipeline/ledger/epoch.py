"""Who may write: one writer after the other, each knowing exactly what its predecessors have left.

A process that was given up may still be alive for a moment, behind a broken connection or because its end has not come
through to it yet, and write once more. So each writer opens an *epoch*: it announces its number, then lists what is
there, and that list, with what it writes itself, is all that ever counts to those who come after it. A record that a
former writer adds later is in nobody's list and does not count; its rows are run again by the new writer, which did
not find them done.

A former writer could do harm only by removing flushes that its part has replaced, if the new one has listed the flushes
and not the commit. It looks whether it is still the last one after its commit and before it removes anything: either
it sees its successor and removes nothing, or the successor lists later than the commit was there.
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
"""Folders of the work folder: results, and dead letters."""

EPOCHS = "epochs"


@dataclass(frozen=True)
class Epoch:
    """The time of one writer.

    Attributes:
        work: The work folder.
        number: Its number.
        token: What tells it from another one that took the same number at the same moment.
        records: Names of the records that former writers have left.
    """

    work: Storage
    number: int
    token: str
    records: tuple[str, ...]
    _numbers: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    @classmethod
    def open(cls, work: Storage) -> Epoch:
        """Begins the next epoch of a work folder."""
        former = _list(work)
        number = max(former, default=0) + 1
        token = uuid.uuid4().hex
        file = work / EPOCHS / _file_name(number)
        file.write_bytes(json.dumps({"token": token}).encode())
        # Flushes before commits, and both after the announcement: see above.
        there = [f"{kind}/{name}" for suffix in (FLUSH, COMMIT) for kind in KINDS for name in _all(work, kind, suffix)]
        known = _known(work, former)
        records = tuple(sorted(name for name in there if name in known.names or _epoch_of(name) == known.number))
        file.write_bytes(json.dumps({"token": token, "records": records}).encode())
        return cls(work, number, token, records)

    def is_last(self) -> bool:
        """Whether nobody has begun an epoch since."""
        last = max(_list(self.work), default=0)
        return last == self.number and _read(self.work, last).get("token") == self.token

    def next_name(self, kind: str) -> str:
        """Returns a name for the next thing written, without a suffix."""
        return f"{kind}/{self.number:06}-{next(self._numbers):06}"


@dataclass(frozen=True)
class _Known:
    """The last epoch that may have written something, and what it found."""

    number: int
    names: frozenset[str]


def _known(work: Storage, numbers: list[int]) -> _Known:
    """Finds the last writer that got as far as to know what its predecessors left; later ones wrote nothing."""
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
