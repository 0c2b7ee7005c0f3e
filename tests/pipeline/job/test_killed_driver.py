"""kill -9 of the driver, or of the process that writes, at random moments: nothing lost, nothing doubled."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import counted_job
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from counted_job import FLUSH_INTERVAL_S, MAX_BLOCKS
from ray import cloudpickle

from millrace import write_results
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.sinks.manifest import Manifest
from millrace.pipeline.sources import Source

cloudpickle.register_pickle_by_value(counted_job)

DEADLINE_S = 120.0
WRITE_S = 2.0
"""What writing a flush may take on a busy machine, on top of the interval."""


@dataclass(frozen=True)
class Done:
    """A row that the engine has done: when, which, and with how many tokens."""

    at_s: float
    prompt: str
    num_tokens: int


def read_log(log: Path) -> list[Done]:
    lines = [line.rsplit(" ", 1) for line in log.read_text().splitlines()] if log.exists() else []
    return [Done(float(left.split(" ", 1)[0]), left.split(" ", 1)[1], int(tokens)) for left, tokens in lines]


def start(folder: Path, output: str, log: Path, seconds_a_row: float) -> subprocess.Popen[str]:
    script = Path(__file__).parent.parent / "counted_job.py"
    address = ray.get_runtime_context().gcs_address
    arguments = [address, str(folder / "in.parquet"), str(folder / output), str(log), str(seconds_a_row)]
    return subprocess.Popen([sys.executable, "-P", str(script), *arguments], stderr=subprocess.PIPE, text=True)


def run_to_the_end(folder: Path, output: str, log: Path, seconds_a_row: float) -> None:
    process = start(folder, output, log, seconds_a_row)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said


def kill_after(process: subprocess.Popen[str], log: Path, num_rows: int) -> float:
    """Kills a driver once the engine has done so many rows in all; returns when."""
    until_s = time.monotonic() + DEADLINE_S
    while len(read_log(log)) < num_rows:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < until_s
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    killed_s = time.time()
    process.communicate()
    return killed_s


def texts(folder: Path) -> dict[int, str]:
    rows = pq.read_table(folder).to_pylist()
    assert max(Counter(row["id"] for row in rows).values()) == 1
    return {row["id"]: row["text"] for row in rows}


@pytest.mark.parametrize(
    ("num_rows", "num_kills", "seconds_a_row"),
    [
        pytest.param(2_000, 3, 0.008, id="2000-rows", marks=pytest.mark.slow),
        pytest.param(20_000, 10, 0.008, id="20000-rows", marks=pytest.mark.soak),
    ],
)
def test_a_killed_driver_costs_a_flush_interval(
    cluster: None, tmp_path: Path, num_rows: int, num_kills: int, seconds_a_row: float
) -> None:
    (tmp_path / "config.json").write_text("{}")
    table = pa.table({"id": range(num_rows), "prompt": [f"row {index}" for index in range(num_rows)]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=1000)
    expected = {index: f"ROW {index}0" for index in range(num_rows)}
    num_whole = sum(len(text) + 1 for text in expected.values())
    if num_kills > 3:  # The engine's answers are known; that the pipeline returns them undisturbed, others test too.
        run_to_the_end(tmp_path, "whole", tmp_path / "whole.log", 0.0)
        assert texts(tmp_path / "whole") == expected
        assert sum(one.num_tokens for one in read_log(tmp_path / "whole.log")) == num_whole

    log = tmp_path / "killed.log"
    draw = random.Random(6)
    killed_s = [
        kill_after(start(tmp_path, "killed", log, seconds_a_row), log, num_done)
        for num_done in sorted(draw.sample(range(num_rows // 20, num_rows), num_kills))
    ]
    assert not (tmp_path / "killed" / "_manifest.json").exists()
    run_to_the_end(tmp_path, "killed", log, seconds_a_row)

    assert texts(tmp_path / "killed") == expected
    manifest = Manifest.read(Storage.at(tmp_path / "killed"))
    assert manifest is not None
    assert (manifest.num_rows, manifest.num_failed) == (num_rows, 0)

    done = read_log(log)
    last = {one.prompt: one for one in done}
    again = [one for one in done if one is not last[one.prompt]]
    # Done in vain is only what was done within a flush interval before a death, or by what outlived it for a moment.
    in_vain = [min(at_s - one.at_s for at_s in killed_s if at_s > one.at_s - WRITE_S) for one in again]
    num_tokens = sum(one.num_tokens for one in done)
    print(
        f"{num_rows} rows, {num_kills} kills: {num_tokens} tokens, {num_whole} uninterrupted, {len(again)} rows done "
        f"again, at most {max(in_vain, default=0.0):.2f} s before a kill"
    )
    assert all(seconds < FLUSH_INTERVAL_S + WRITE_S for seconds in in_vain), max(in_vain)
    at_risk_s, a_row = FLUSH_INTERVAL_S + WRITE_S, max(one.num_tokens for one in done)
    most_a_kill = a_row * (MAX_BLOCKS / seconds_a_row * at_risk_s + MAX_BLOCKS)
    assert num_tokens <= num_whole + num_kills * most_a_kill


@pytest.mark.slow
def test_a_killed_writer_is_followed_by_another(cluster: None, tmp_path: Path) -> None:
    num_rows = 800
    (tmp_path / "config.json").write_text("{}")
    prompts = [f"row {index}" for index in range(num_rows)]
    pq.write_table(pa.table({"id": range(num_rows), "prompt": prompts}), tmp_path / "in.parquet")
    log, out = tmp_path / "log", str(tmp_path / "out")

    def kill() -> None:
        until_s = time.monotonic() + DEADLINE_S
        while len(read_log(log)) < num_rows // 2 and time.monotonic() < until_s:
            time.sleep(0.01)
        workers = psutil.process_iter(["pid", "cmdline"])
        for one in workers:
            if "MapBatches(GenerateAndWrite)" in " ".join(one.info["cmdline"] or []):
                os.kill(one.pid, signal.SIGKILL)
                killed.append(one.pid)

    killed: list[int] = []
    killer = threading.Thread(target=kill)
    killer.start()
    with counted_job.make_processor(tmp_path, str(log), 0.01) as processor:
        source = Source.find(str(tmp_path / "in.parquet"))
        manifest = write_results(processor, source.read(), out, flush_interval_s=FLUSH_INTERVAL_S)
    killer.join()
    assert killed
    assert manifest.num_rows == num_rows
    assert texts(tmp_path / "out") == {index: f"ROW {index}0" for index in range(num_rows)}
    assert len(read_log(log)) < num_rows + num_rows // 2
