"""From parts in the work folder to the files of an output, in one go, whatever interrupts it.

What is to be done is written down first (`PLAN`): which file becomes which, and the manifest. Then the files are moved,
those of a Delta table are committed, the manifest is written, and what it no longer names is removed. Each step may be
done again, so whoever finds a plan goes through it from the start. The output is whole when its manifest is there, and
then it is that of the manifest.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any

from ..files.delta import DELTA
from ..files.storage import Storage
from ..ledger.epoch import FAILED, KINDS, RESULTS, Epoch
from ..ledger.folder import FAILED_FOLDER, MANIFEST, PLAN, RETRY
from ..ledger.records import Record, read_flush_rows, read_records, sum_counts
from ..report.counts import Counts
from .delta import TableCommit, commit, schema_text
from .ordered import order_parts
from .parts import Flushed, OutputSpec, PartWriter


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of an output.

    Attributes:
        name: Its name, from the output folder.
        num_rows: Number of its rows.
        num_bytes: Its size.
    """

    name: str
    num_rows: int
    num_bytes: int


@dataclass(slots=True)
class Manifest:
    """What an output consists of.

    Attributes:
        files: Results.
        failed_files: Dead letters.
        counts: What the results add up to.
        failed_counts: What the dead letters add up to.
        table_version: Version of the Delta table that has the results; None for files that are no table.
    """

    files: list[OutputFile] = field(default_factory=list)
    failed_files: list[OutputFile] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    failed_counts: Counts = field(default_factory=Counts)
    table_version: int | None = None

    @property
    def num_rows(self) -> int:
        """Number of results."""
        return sum(one.num_rows for one in self.files)

    @property
    def num_failed(self) -> int:
        """Number of dead letters."""
        return sum(one.num_rows for one in self.failed_files)

    @property
    def total(self) -> Counts:
        """What results and dead letters add up to."""
        total = Counts()
        total.merge(self.counts)
        total.merge(self.failed_counts)
        return total

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest as plain data for JSON."""
        return {
            "num_rows": self.num_rows,
            "num_failed": self.num_failed,
            "files": [asdict(one) for one in self.files],
            "failed_files": [asdict(one) for one in self.failed_files],
            "counts": self.counts.as_dict(),
            "failed_counts": self.failed_counts.as_dict(),
            **({} if self.table_version is None else {"table_version": self.table_version}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Manifest:
        """Returns the manifest that `as_dict` described."""
        return cls(
            [OutputFile(**one) for one in data["files"]],
            [OutputFile(**one) for one in data["failed_files"]],
            Counts.from_dict(data["counts"]),
            Counts.from_dict(data["failed_counts"]),
            data.get("table_version"),
        )

    @classmethod
    def read(cls, output: Storage) -> Manifest | None:
        """Reads the manifest of an output folder; None if the output is not whole."""
        file = output / MANIFEST
        return cls.from_dict(json.loads(file.read_bytes())) if file.exists() else None


def publish(output: Storage, spec: OutputSpec, former: Manifest | None = None) -> Manifest:
    """Makes the files of an output of everything that is in its work folder.

    Args:
        output: The output folder.
        spec: What was written.
        former: What the output consists of already, if its dead letters were run again: its results stay, its dead
            letters give way.

    Returns:
        What it consists of now.
    """
    plan = spec.work / PLAN
    if not plan.exists():
        former = former or Manifest()
        parts = _close_parts(Epoch.open(spec.work), spec)
        token = uuid.uuid4().hex
        moves, manifest = _plan(parts, former, f"-{token}" if spec.format == DELTA else "")
        removed = [one.name for one in former.failed_files]
        steps = {"moves": moves, "manifest": manifest.as_dict(), "removed": removed}
        if spec.format == DELTA:
            steps["commit"] = asdict(_table_commit(token, former, manifest, spec))
        plan.write_bytes(json.dumps(steps).encode())
    return _carry_out(output, spec.work, json.loads(plan.read_bytes()))


def _close_parts(epoch: Epoch, spec: OutputSpec) -> dict[str, list[Record]]:
    """Makes parts of what is still in flushes.

    Returns:
        The commits of all parts, by kind; those of ordered results are of parts that follow on each other.
    """
    records = read_records(epoch.work, epoch.records)
    parts = {}
    for kind in KINDS:
        own = [record for record in records if record.name.startswith(f"{kind}/")]
        writer = PartWriter(epoch, kind, spec.part_format(kind), spec.max_rows_per_file)
        parts[kind] = [record for record in own if record.part is not None]
        closed = []
        for record in own:
            if record.part is None:
                rows = read_flush_rows(epoch.work, record.name)
                closed += writer.take_over(Flushed(record.name, rows, record.counts))
        closed += writer.close_part()
        parts[kind] += [record for record, _ in closed]
    if spec.is_ordered:
        parts[RESULTS] = order_parts(epoch, parts[RESULTS], spec)
    return parts


def _table_commit(token: str, former: Manifest, manifest: Manifest, spec: OutputSpec) -> TableCommit:
    """Says what the table will hold: these results, and those before of which only the dead letters run again."""
    assert spec.schema is not None
    added = [asdict(one) for one in manifest.files if one not in former.files]
    return TableCommit(token, former.table_version is None, schema_text(spec.schema), added)


def _plan(parts: dict[str, list[Record]], former: Manifest, suffix: str) -> tuple[list[tuple[str, str]], Manifest]:
    """Names the files. Numbers go on after those that are there: old and new dead letters are there for a moment.

    Names of a table's files are never used again, since its old versions have them: a suffix makes each one new.
    """
    counts = sum_counts(parts[RESULTS])
    counts.merge(former.counts)
    manifest = Manifest(list(former.files), [], counts, sum_counts(parts[FAILED]))
    moves = []
    for kind, files, first, folder in (
        (RESULTS, manifest.files, _next_number(former.files), ""),
        (FAILED, manifest.failed_files, _next_number(former.failed_files), f"{FAILED_FOLDER}/"),
    ):
        for number, record in enumerate(parts[kind], first):
            assert record.part is not None
            name = f"{folder}part-{number:05}{suffix}.{record.part.rpartition('.')[2]}"
            moves.append((record.part, name))
            files.append(OutputFile(name, record.num_rows, record.num_bytes))
    return moves, manifest


def _next_number(files: list[OutputFile]) -> int:
    numbers = [re.search(r"part-(\d+)", one.name) for one in files]
    return max((int(one[1]) + 1 for one in numbers if one), default=0)


def _carry_out(output: Storage, work: Storage, plan: dict[str, Any]) -> Manifest:
    there = {one.url for kind in KINDS for one in (work / kind).list()}
    for part, name in plan["moves"]:
        if (work / part).url in there:  # Else it was moved before an interruption.
            (work / part).move_to(output / name)
    manifest = Manifest.from_dict(plan["manifest"])
    if "commit" in plan:
        manifest.table_version = commit(output, TableCommit(**plan["commit"]))
    (output / MANIFEST).write_bytes(json.dumps(manifest.as_dict(), indent=2).encode())
    for name in plan["removed"]:
        (output / name).remove()
    # In this order: nobody is to find a retry that has ended, or to take leftovers for work.
    for name in (RETRY, PLAN):
        (work / name).remove()
    work.remove()
    return manifest
