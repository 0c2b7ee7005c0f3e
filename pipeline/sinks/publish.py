"""`publish`: moves the parts of a work folder to the output folder, all at once, even if it is interrupted.

A plan is written first (`PLAN`): the new name of each file, and the manifest. Then the files are moved, the format's
publisher commits them, the manifest is written, and files that it no longer names are removed. Each step may be
repeated, so a run that finds a plan carries it out from the start. The output is whole when its manifest exists, and
its content is the content of the manifest.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import asdict
from typing import Any

from ..files.storage import Storage
from ..ledger.counts import Counts
from ..ledger.epoch import FAILED, KINDS, RESULTS, Epoch
from ..ledger.records import Record, read_flush_rows, read_records
from .formats import FORMATS
from .manifest import FAILED_FOLDER, MANIFEST, Manifest, OutputFile
from .ordered import order_parts
from .parts import Flushed, OutputSpec, PartWriter
from .publisher import Publisher

PLAN = "publish.json"
RETRY = "retry.json"
"""File in a work folder that marks that the dead letters of a finished output run again."""


def publish(output: Storage, spec: OutputSpec, former: Manifest | None = None) -> Manifest:
    """Publishes all rows of a work folder as the files of an output.

    Args:
        output: The output folder.
        spec: Format and place of the output.
        former: The content of the output so far, if its dead letters were run again. Its results stay, and its dead
            letters are removed.

    Returns:
        The content of the output now.
    """
    publisher = FORMATS[spec.format].publisher
    plan = spec.work / PLAN
    if not plan.exists():
        parts = _close_parts(Epoch.open(spec.work), spec)
        steps = _plan(parts, former or Manifest(), spec, publisher)
        plan.write_bytes(json.dumps(steps).encode())
    return _carry_out(output, spec.work, json.loads(plan.read_bytes()), publisher)


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
    if spec.is_ordered:
        parts[RESULTS] = order_parts(epoch, parts[RESULTS], spec)
    return parts


def _plan(parts: dict[str, list[Record]], former: Manifest, spec: OutputSpec, publisher: Publisher) -> dict[str, Any]:
    """Returns the plan as plain data for JSON: moves, commit, manifest, and names of files to remove."""
    token = uuid.uuid4().hex
    suffix = publisher.file_suffix(token)
    results = _name_files(parts[RESULTS], former.files, "", suffix)
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
        named.append((record.part, OutputFile(name, record.num_rows, record.num_bytes)))
    return named


def _carry_out(output: Storage, work: Storage, plan: dict[str, Any], publisher: Publisher) -> Manifest:
    present = {file.url for kind in KINDS for file in (work / kind).list()}
    for part, name in plan["moves"]:
        if (work / part).url in present:  # A part that is missing was moved by an interrupted run.
            (work / part).move_to(output / name)
    manifest = Manifest.from_dict(plan["manifest"])
    manifest.table_version = publisher.commit(output, plan.get("commit"))
    (output / MANIFEST).write_bytes(json.dumps(manifest.as_dict(), indent=2).encode())
    for name in plan["removed"]:
        (output / name).remove()
    # The order matters: a later run must not find a finished retry, or take leftover files for unfinished work.
    for name in (RETRY, PLAN):
        (work / name).remove()
    work.remove()
    return manifest
