"""A job that embeds 20,000 texts, is killed twice and goes on, writes what the job that was left alone writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from encoders import tiny_encoder

MILLRACE = [sys.executable, "-P", "-c", "from millrace.pipeline.cli import main; main()"]
NUM_TEXTS, SIZE = 20_000, 64
DEADLINE_S = 300.0


def kill_after_flushes(command: list[str], folder: Path, environment: dict[str, str], num_flushes: int) -> None:
    """Starts a job and kills it once so many files of finished rows are there."""
    work = folder / "killed" / "_millrace" / "work" / "results"
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, start_new_session=True) as job:
        waiting = Retrying(
            stop=stop_after_delay(DEADLINE_S), wait=wait_fixed(0.02), retry=retry_if_result(lambda done: not done)
        )
        waiting(lambda: len(list(work.glob("*.flush"))) >= num_flushes)
        job.kill()
    assert not (folder / "killed" / "_manifest.json").exists()


@pytest.mark.soak
def test_twenty_thousand_texts_survive_two_deaths(tmp_path: Path) -> None:
    model = tiny_encoder(tmp_path / "model", "bert")
    texts = [f"line {i} of {'many ' * (i % 9)}notes" for i in range(NUM_TEXTS)]
    pq.write_table(pa.table({"id": range(NUM_TEXTS), "text": texts}), tmp_path / "in.parquet")
    options = ["--model", str(model), "--column", "text", "--embedding-dtype", "float32", "--engine", "dtype=float32"]
    killed, whole = ([*MILLRACE, "embed", "in.parquet", name, *options] for name in ("killed", "whole"))
    environment = {**os.environ, "MILLRACE_JOB_FLUSH_INTERVAL_S": "0.2"}
    kill_after_flushes(killed, tmp_path, environment, 1)
    num_flushes = len(list((tmp_path / "killed" / "_millrace" / "work" / "results").glob("*.flush")))
    kill_after_flushes(killed, tmp_path, environment, num_flushes + 1)
    for command in (killed, whole):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"{NUM_TEXTS:,} in, {NUM_TEXTS:,} out, 0 failed" in done.stdout
    ours, theirs = (pq.read_table(tmp_path / name).sort_by("id") for name in ("killed", "whole"))
    assert ours.schema.field("embeddings").type == pa.list_(pa.field("element", pa.float32()), SIZE)
    assert ours["id"].to_pylist() == theirs["id"].to_pylist() == list(range(NUM_TEXTS))
    assert ours["text"].to_pylist() == texts
    vectors = [table["embeddings"].combine_chunks().flatten().to_numpy().reshape(-1, SIZE) for table in (ours, theirs)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
