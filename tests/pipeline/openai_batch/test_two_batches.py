"""Two runs of one batch file: one is refused with who holds it, and each line has one answer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from millrace.engine.errors import DamagedOutputError, OutputInUseError
from millrace.pipeline.openai_batch import BatchConfig, BatchSummary, job, run_batch
from millrace.pipeline.openai_batch.folder import BatchFolder
from millrace.pipeline.sinks.manifest import MANIFEST, Manifest, OutputFile

NUM_LINES, DEADLINE_S = 300, 300.0
CLI = "from millrace.pipeline.cli import main; main()"


def write_input(folder: Path, num_lines: int) -> None:
    body = {"model": "m", "prompt": "Inv #1", "max_tokens": 8}
    line = {"method": "POST", "url": "/v1/completions", "body": body}
    lines = [json.dumps({"custom_id": f"r{number}", **line}) for number in range(num_lines)]
    (folder / "in.jsonl").write_text("\n".join(lines))


def test_of_two_runs_at_the_same_moment_one_is_refused_with_who_holds_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_input(tmp_path, 1)
    config = BatchConfig(model="bundled:invoices", input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"))
    together, over = threading.Barrier(2), threading.Event()
    refused: list[OutputInUseError] = []
    finished: list[BatchSummary] = []

    def answer_all(*args: Any) -> Manifest:
        assert over.wait(60)
        return Manifest()

    def try_to_run() -> None:
        together.wait()
        try:
            finished.append(run_batch(config))
        except OutputInUseError as error:
            refused.append(error)
            over.set()

    monkeypatch.setattr(job, "_run_lines", answer_all)
    threads = [threading.Thread(target=try_to_run) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert (len(finished), len(refused)) == (1, 1)
    assert f"process {os.getpid()} on " in str(refused[0]) and str(tmp_path / "out.jsonl") in str(refused[0])
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]


def test_a_part_that_has_changed_since_a_former_run_is_not_answered_from(tmp_path: Path) -> None:
    write_input(tmp_path, 1)
    config = BatchConfig(model="bundled:invoices", input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"))
    folder = BatchFolder(config)
    folder.begin()
    (folder.root / "a.parquet").write_bytes(b"x")
    manifest = Manifest([OutputFile("a.parquet", 1, 1, "00")])
    (folder.root / MANIFEST).write_bytes(json.dumps(manifest.as_dict()).encode())
    with pytest.raises(DamagedOutputError, match=r"a\.parquet"):
        run_batch(config)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_of_two_processes_at_once_one_is_refused_and_each_line_is_answered_once(tmp_path: Path, seed: int) -> None:
    write_input(tmp_path, NUM_LINES)
    first = start(tmp_path)
    time.sleep([0.0, 0.01, 1.0, random.Random(seed).uniform(4, 12)][seed])
    second = start(tmp_path)
    ends = {one.communicate(timeout=DEADLINE_S)[1]: one.returncode for one in (first, second)}
    assert sorted(ends.values()) == [0, 2], ends
    said = next(text for text, status in ends.items() if status == 2)
    assert "another run writes to output" in said or "is there already" in said
    answers = [json.loads(line)["custom_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == [f"r{number}" for number in range(NUM_LINES)]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_batch_leaves_nothing_beside_the_files_of_the_next_run(tmp_path: Path, seed: int) -> None:
    write_input(tmp_path, NUM_LINES)
    killed = start(tmp_path)
    time.sleep(random.Random(seed).uniform(3, 15))
    killed.kill()
    killed.communicate()
    (tmp_path / ".out.jsonl.0123456789ab.tmp").touch()
    following = start(tmp_path)
    said = following.communicate(timeout=DEADLINE_S)[1]
    assert following.returncode == 0 or "is there already" in said
    answers = [json.loads(line)["custom_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == [f"r{number}" for number in range(NUM_LINES)]
    if following.returncode == 0:
        assert sorted(one.name for one in tmp_path.iterdir()) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]


def start(folder: Path) -> subprocess.Popen[str]:
    command = ["batch", "in.jsonl", "out.jsonl", "--model", "bundled:invoices"]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", CLI, *command],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "local"},
    )
