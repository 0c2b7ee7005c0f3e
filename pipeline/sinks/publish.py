"""`publish`: moves the parts of a work folder to the output folder, all at once, even if it is interrupted.

A plan is written first (`PLAN`): the new name of each file, and the manifest. Then the files are moved, the format's
publisher commits them, the manifest is written, and files that it no longer names are removed. Each step may be
repeated, so a run that finds a plan carries it out from the start. The output is whole when its manifest exists, and
its content is the content of the manifest.

No manifest is written that does not account for every row: the plan is made only if each row has finished once, and
each part is read again and compared with its checksum before the first one is moved.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...engine.errors import DamagedOutputError
from ..files.storage import Storage
from ..ledger.claim import Claim
from ..ledger.counts import Counts
from ..ledger.epoch import FAILED, KINDS, RESULTS, Epoch
from ..ledger.index import RowIndex
from ..ledger.records import Record, check_file, checksum, read_flush_rows, read_ids, read_records
from .formats import FORMATS
from .manifest import FAILED_FOLDER, MANIFEST, Manifest, OutputFile
from .ordered import order_parts
from .parts import Flushed, OutputSpec, PartWriter
from .publisher import Publisher

PLAN = "publish.json"
RETRY = "retry.json"
"""File in a work folder that marks that the dead letters of a finished output run again."""
READERS = 2
"""Number of parts that are read at once to be checked."""


@dataclass(frozen=True, slots=True)
class Expected:
    """The number of rows that an output must have.

    Attributes:
        num_rows: Number of rows.
        is_exact: Whether more rows are wrong too.
    """

    num_rows: int = 0
    is_exact: bool = False

    def check(self, num_rows: int, output: str) -> None:
        """Checks the number of rows of an output.

        Raises:
            DamagedOutputError: Rows are missing, or there are too many.
        """
        if num_rows < self.num_rows or (self.is_exact and num_rows != self.num_rows):
            raise DamagedOutputError(
                f"{self.num_rows} rows went into output {output!r} and {num_rows} have finished, so nothing was "
                "published; resume to run the missing rows, or pass --overwrite to begin anew"
            )


def publish(
    output: Storage,
    spec: OutputSpec,
    former: Manifest | None = None,
    claim: Claim | None = None,
    expected: Expected = Expected(),
) -> Manifest:
    """Publishes all rows of a work folder as the files of an output.

    Args:
        output: The output folder.
        spec: Format and place of the output.
        former: The content of the output so far, if its dead letters were run again. Its results stay, and its dead
            letters are removed.
        claim: The claim of this process on the output; None if no other process can know the output.
        expected: The number of rows that the output must have, those of `former` included.

    Returns:
        The content of the output now.

    Raises:
        DamagedOutputError: Rows or files are missing or damaged; nothing was published.
        OutputInUseError: Another run has taken the output over.
    """
    publisher = FORMATS[spec.format].publisher
    check_claim = claim.check if claim is not None else lambda: None
    check_claim()
    plan = spec.work / PLAN
    if plan.exists():
        steps = _read_plan(output, spec.work)
        expected.check(_num_rows(steps), output.url)
        _check_again(output, spec.work, steps)
    else:
        parts = _close_parts(Epoch.open(spec.work), spec)
        steps = _plan(parts, former or Manifest(), spec, publisher)
        expected.check(_num_rows(steps), output.url)
        _check_parts(output, spec.work, steps)
        check_claim()
        plan.write_bytes(json.dumps({**steps, "checksum": _digest(steps)}).encode())
    return _carry_out(output, spec.work, steps, publisher, check_claim)


def _close_parts(epoch: Epoch, spec: OutputSpec) -> dict[str, list[Record]]:
    """Writes the rows of all flushes that no part holds yet into parts, and commits the parts.

    Returns:
        Kind of part (results or failed rows) -> the commit records of all parts of the work folder, the parts that were
        there before included. In an ordered output, the parts of results are rewritten in the order of the
        input, and each begins after the last row of the part before.
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
    _check_each_once(epoch.work, [record for own in parts.values() for record in own])
    if spec.is_ordered:
        _check_files([(epoch.work / str(one.part), one.num_bytes, one.checksum) for one in parts[RESULTS]])
        parts[RESULTS] = order_parts(epoch, parts[RESULTS], spec)
    return parts


def _check_each_once(work: Storage, records: list[Record]) -> None:
    """Checks that no row is in two places, before the parts are published."""
    ids = RowIndex(read_ids(work, record) for record in records).sorted_ids()
    if len(ids) and (num_twice := int(np.count_nonzero(ids[1:] == ids[:-1]))):
        raise DamagedOutputError(
            f"{num_twice} rows are twice in {work.url!r}, so nothing was published; pass --overwrite to begin anew"
        )


def _plan(parts: dict[str, list[Record]], former: Manifest, spec: OutputSpec, publisher: Publisher) -> dict[str, Any]:
    """Returns the plan as plain data for JSON: moves, commit, manifest, and names of files to remove."""
    token = uuid.uuid4().hex
    suffix = publisher.file_suffix(token)
    results = _name_files(parts[RESULTS], former.files, publisher.files_folder, suffix)
    failed = _name_files(parts[FAILED], former.failed_files, f"{FAILED_FOLDER}/", suffix)
    counts = Counts.sum([*(record.counts for record in parts[RESULTS]), former.counts])
    failed_counts = Counts.sum(record.counts for record in parts[FAILED])
    files = [file for _, file in results]
    manifest = Manifest([*former.files, *files], [file for _, file in failed], counts, failed_counts)
    added = [asdict(file) for file in files]
    return {
        "moves": [(part, file.name) for part, file in (*results, *failed)],
        "commit": publisher.plan_commit(token, spec.schema, added, replaces=former.table_version is None),
        "manifest": manifest.as_dict(),
        "removed": [file.name for file in former.failed_files],
    }


def _name_files(
    parts: list[Record], former: list[OutputFile], folder: str, suffix: str
) -> list[tuple[str, OutputFile]]:
    """Returns (name of the part, output file) of each part; the numbers of the files follow those in `former`."""
    numbers = [re.search(r"part-(\d+)", file.name) for file in former]
    first = max((int(number[1]) + 1 for number in numbers if number), default=0)
    named = []
    for number, record in enumerate(parts, first):
        assert record.part is not None
        name = f"{folder}part-{number:05}{suffix}.{record.part.rpartition('.')[2]}"
        named.append((record.part, OutputFile(name, record.num_rows, record.num_bytes, record.checksum)))
    return named


def _digest(steps: dict[str, Any]) -> str:
    return checksum(json.dumps(steps, sort_keys=True).encode())


def _read_plan(output: Storage, work: Storage) -> dict[str, Any]:
    """Reads a plan and checks that it is whole and names only files of its output. Old plans have no checksum."""
    file = work / PLAN
    try:
        steps: dict[str, Any] = file.read_json()
        expected = steps.pop("checksum", None)
        manifest = Manifest.from_dict(steps["manifest"])
        files = {one.name for one in (*manifest.files, *manifest.failed_files)}
        moved, removed = {name for _, name in steps["moves"]}, list(steps["removed"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedOutputError(f"{file.url!r} is damaged ({error}); pass --overwrite to begin anew") from error
    if expected not in (None, _digest(steps)) or not files.issuperset(moved):
        raise DamagedOutputError(f"{file.url!r} has changed since it was written; pass --overwrite to begin anew")
    manifest.check_names(output)
    for part, _ in steps["moves"]:
        work.inside(part)
    for name in removed:
        output.inside(name)
    return steps


def _num_rows(steps: dict[str, Any]) -> int:
    return Manifest.from_dict(steps["manifest"]).total.num_rows


def _check_again(output: Storage, work: Storage, steps: dict[str, Any]) -> None:
    """Checks the parts of a plan that an earlier run wrote. A plan that cannot be carried out is removed if it can."""
    try:
        _check_parts(output, work, steps)
    except DamagedOutputError:
        if not any(output.inside(name).exists() for _, name in steps["moves"]):
            (work / PLAN).remove()  # The next run makes another plan, of the records that are there.
        raise


def _check_parts(output: Storage, work: Storage, steps: dict[str, Any]) -> None:
    """Reads each part, where it is now, and checks its length and checksum."""
    manifest = Manifest.from_dict(steps["manifest"])
    files = {one.name: one for one in (*manifest.files, *manifest.failed_files)}

    def place_of(part: str, name: str) -> Storage:
        file, moved = work.inside(part), output.inside(name)  # An interrupted run may have moved the part.
        return moved if moved.exists() and not file.exists() else file

    _check_files([(place_of(part, name), files[name].num_bytes, files[name].checksum) for part, name in steps["moves"]])


def _check_files(written: Sequence[tuple[Storage, int, str]]) -> None:
    """Reads files and compares each with the length and the checksum that it was written with."""
    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(lambda one: check_file(*one), written))


def _carry_out(
    output: Storage, work: Storage, plan: dict[str, Any], publisher: Publisher, check_claim: Callable[[], None]
) -> Manifest:
    present = {file.url for kind in KINDS for file in (work / kind).list()}
    check_claim()
    try:
        for part, name in plan["moves"]:
            if (work / part).url in present:  # A part that is missing was moved by an interrupted run.
                (work / part).move_to(output / name)
    except FileNotFoundError:
        check_claim()  # A run that has taken the output over may have removed the parts.
        raise
    check_claim()
    manifest = Manifest.from_dict(plan["manifest"])
    manifest.table_version = publisher.commit(output, plan.get("commit"))
    check_claim()  # A commit may take long. No manifest names files that another run has replaced meanwhile.
    (output / MANIFEST).write_bytes(json.dumps(manifest.as_dict(), indent=2).encode())
    for name in plan["removed"]:
        (output / name).remove()
    check_claim()
    # The order matters: a later run must not find a finished retry, or take leftover files for unfinished work.
    for name in (RETRY, PLAN):
        (work / name).remove()
    work.remove()
    return manifest
