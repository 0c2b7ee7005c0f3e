"""Measures the index of finished rows: memory and lookups of a worker that resumes a job of 20 million rows.

    python benchmarks/ledger.py [--rows 20000000] [--lookups 2000000] [--block 1024]

Writes the commit records of that many finished rows. A new process then does the work of a worker at its start: it
reads the records into the index, and looks up blocks of rows, half of them done. Prints one JSON line for rows with
their position as id, and one for rows with a key, in which hashing the key is part of a lookup. `memory_mb` is the
growth of the process's resident memory, mapped file cache included; `anonymous_mb` is the part that the system cannot
drop.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from millrace.pipeline import columns
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.job.durable import Identity
from millrace.pipeline.ledger import row_id
from millrace.pipeline.ledger.counts import Counts
from millrace.pipeline.ledger.epoch import RESULTS
from millrace.pipeline.ledger.index import RowIndex
from millrace.pipeline.ledger.records import COMMIT, Record, read_ids, read_records, write_commit
from millrace.pipeline.sources.base import position_column

PART_ROWS = 50_000
CASES = ("position", "key")


def rows_of(case: str, numbers: np.ndarray) -> pa.Table:
    """Returns the rows of these numbers, in the form in which the source of a job yields them."""
    if case == "position":
        return pa.table({columns.POSITION: position_column(0, numbers)})
    return pa.table({"key": [f"customer-{number:09}" for number in numbers]})


def identity_of(case: str) -> Identity:
    """Returns the way in which the rows of a case get their ids."""
    return Identity(("key",) if case == "key" else None)


def write_records(work: Storage, case: str, num_rows: int) -> None:
    """Writes the commits of parts with every second row; neighbours finish in the same part."""
    for part, start in enumerate(range(0, num_rows, PART_ROWS)):
        numbers = np.arange(start, min(start + PART_ROWS, num_rows)) * 2
        ids = np.sort(identity_of(case).ids_of(rows_of(case, numbers)))
        first, last = row_id.as_bytes(ids[[0, -1]])
        name = f"{RESULTS}/000001-{part:06}"
        write_commit(work, Record(name + COMMIT, len(ids), Counts(), f"{name}.parquet", 0, (), first, last), ids)


def resident() -> tuple[float, float]:
    """Returns this process's resident memory in MB, and the part of it that is not file cache."""
    memory = psutil.Process().memory_info()
    return memory.rss / 1e6, (memory.rss - memory.shared) / 1e6


def measure(work: Storage, case: str, num_rows: int, num_lookups: int, block: int) -> dict[str, Any]:
    """Does the work of a worker at its start and for each block, and returns its time and memory."""
    before = resident()
    start_s = time.monotonic()
    names = [f"{RESULTS}/{one.name}" for one in (work / RESULTS).list(COMMIT)]
    index = RowIndex(read_ids(work, record) for record in read_records(work, names))
    built_s = time.monotonic() - start_s
    identity, draw = identity_of(case), random.Random(0)
    starts = [draw.randrange(2 * num_rows) for _ in range(max(1, num_lookups // block))]
    num_found, looked_s = 0, 0.0
    for start in starts:
        table = rows_of(case, np.arange(start, start + block))
        start_s = time.monotonic()
        num_found += int(index.contains(identity.ids_of(table)).sum())
        looked_s += time.monotonic() - start_s
    after = resident()
    return {
        "benchmark": "ledger",
        "case": case,
        "rows": len(index),
        "build_s": round(built_s, 2),
        "memory_mb": round(after[0] - before[0], 1),
        "anonymous_mb": round(after[1] - before[1], 1),
        "lookups": len(starts) * block,
        "found": num_found,
        "lookups_per_s": round(len(starts) * block / looked_s),
    }


def main() -> None:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--lookups", type=int, default=2_000_000)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        work = Storage.at(options.work)
        print(json.dumps(measure(work, options.case, options.rows, options.lookups, options.block)))
        return
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_records(Storage.at(folder), case, options.rows)
            arguments = ["--rows", "--lookups", "--block"]
            values = [str(options.rows), str(options.lookups), str(options.block)]
            given = [word for pair in zip(arguments, values, strict=True) for word in pair]
            command = [sys.executable, __file__, *given, "--case", case, "--work", folder]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
