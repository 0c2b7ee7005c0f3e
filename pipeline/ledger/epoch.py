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
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ...engine.errors import DamagedOutputError
from ..files.storage import Storage
from .records import COMMIT, FLUSH

RESULTS = "results"
FAILED = "failed"
KINDS = (RESULTS, FAILED)
"""The folders in a work folder: one for results, and one for dead letters."""

EPOCHS = "epochs"
TOKEN_CHARS = 8
NUMBER = re.compile(r"[0-9]{6,9}")
RECORD_NAME = re.compile(r"\w+/(\d{6,})-(?:([0-9a-f]{8})-)?\d{6,}\.\w+")
"""Names of records: the number of the epoch, the beginning of its token (older versions had none), and a number."""


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
        token = uuid.uuid4().hex
        while True:
            former = _list(work)
            number = max(former, default=0) + 1
            file = work.inside(EPOCHS + "/" + _file_name(number))
            if file.create(json.dumps({"token": token}).encode()):  # Otherwise another process has just done so.
                break
        # The module's docstring says why flushes come before commits, and both after the announcement.
        there = [f"{kind}/{name}" for suffix in (FLUSH, COMMIT) for kind in KINDS for name in _all(work, kind, suffix)]
        known = _known(work, former)
        records = tuple(sorted(name for name in there if name in known.names or known.has_written(name)))
        file.write_bytes(json.dumps({"token": token, "records": records}).encode())
        return cls(work, number, token, records)

    def is_last(self) -> bool:
        """Returns whether this is still the newest epoch of the work folder, so that no other process has begun one."""
        last = max(_list(self.work), default=0)
        return last == self.number and _token(self.work, last) == self.token

    def next_name(self, kind: str) -> str:
        """Returns a name for a record or a part of `kind`, without a suffix, that no other call returns."""
        return f"{kind}/{self.number:06}-{self.token[:TOKEN_CHARS]}-{next(self._numbers):06}"


@dataclass(frozen=True)
class _Known:
    """The last epoch that may have written records: its number, its token, and the earlier records it listed."""

    number: int
    token: str
    names: frozenset[str]

    def has_written(self, name: str) -> bool:
        """Returns whether a record is one of this epoch. Another epoch may have had its number, before `overwrite`."""
        found = RECORD_NAME.fullmatch(name)
        return found is not None and int(found[1]) == self.number and found[2] in (None, self.token[:TOKEN_CHARS])


def _known(work: Storage, numbers: list[int]) -> _Known:
    """Finds the last of the numbered epochs that listed earlier records. An epoch without a list wrote no record."""
    for number in sorted(numbers, reverse=True):
        about = _read(work, number)
        if "records" in about:
            return _Known(number, about["token"], frozenset(about["records"]))
    return _Known(0, "", frozenset())


def _list(work: Storage) -> list[int]:
    names = [one.name.removesuffix(".json") for one in (work / EPOCHS).list(".json")]
    return [int(name) for name in names if NUMBER.fullmatch(name)]


def _all(work: Storage, kind: str, suffix: str) -> list[str]:
    return [one.name for one in (work / kind).list(suffix) if one.name[0] != "."]


def _read(work: Storage, number: int) -> dict[str, Any]:
    file = work / EPOCHS / _file_name(number)
    try:
        about: dict[str, Any] = file.read_json()
        if isinstance(about["token"], str) and all(isinstance(name, str) for name in about.get("records", ())):
            return about
    except (ValueError, KeyError, TypeError):
        pass
    raise DamagedOutputError(f"{file.url!r} is damaged, so it is not known which rows are done; pass --overwrite")


def _token(work: Storage, number: int) -> str | None:
    """Returns the token of an epoch; None if its file is gone, as after `overwrite`."""
    try:
        return _read(work, number)["token"]
    except FileNotFoundError:
        return None


def _file_name(number: int) -> str:
    return f"{number:06}.json"
