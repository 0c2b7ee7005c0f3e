"""Two runs of one output, and runs that are ended at any moment: each row once, a true manifest, one run refused."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.pipeline.files.storage import Storage
from millrace.pipeline.ledger.records import check_file
from millrace.pipeline.sinks.manifest import Manifest
from s3 import CREDENTIALS, S3Server

NUM_ROWS = 400
DEADLINE_S = 300.0
REFUSED, STOPPED, ROWS_FAILED = 2, {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}, 3
CLI = "from millrace.pipeline.cli import main; main()"


class Job:
    """A job of the command line on a tiny model, whose runs are processes."""

    def __init__(self, folder: Path, model: Path, output: Storage) -> None:
        self.output = output
        table = pa.table({"id": range(NUM_ROWS), "line": [f"row {index}" for index in range(NUM_ROWS)]})
        pq.write_table(table, folder / "in.parquet", row_group_size=50)
        self.arguments = [
            "run", "--model", str(model), "--input", str(folder / "in.parquet"), "--output", output.url,
            "--prompt", "{line}", "--max-tokens", "8", "--batch-size", "16", "--set", "flush_interval_s=0.2",
            "--set", "engine.max_model_len=64", "--set", "engine.num_threads=1", "--set", "max_rows_per_file=90",
        ]  # fmt: skip
        if not output.is_local:
            self.arguments += ["--set", f"endpoint_url={output.options.endpoint_url}"]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", CLI, *self.arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **CREDENTIALS, "RAY_ADDRESS": "local"},
        )

    def finish(self) -> None:
        process = self.start()
        _, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0 or "already holds a finished job" in said, said

    def check(self) -> None:
        """Checks that each row is there once, and that the manifest tells the truth."""
        manifest = Manifest.read(self.output)
        assert manifest is not None
        assert (manifest.num_rows, manifest.num_failed, manifest.total.num_rows) == (NUM_ROWS, 0, NUM_ROWS)
        ids: list[int] = []
        for one in manifest.files:
            check_file(self.output / one.name, one.num_bytes, one.checksum)
            with (self.output / one.name).open_arrow() as opened:
                part = pq.read_table(opened)["id"].to_pylist()
            assert len(part) == one.num_rows
            ids += part
        assert sorted(ids) == list(range(NUM_ROWS))
        assert len(self.output.list(".parquet")) == len(manifest.files)
        assert not self.output.list(".tmp")


@pytest.fixture(params=["local", "s3"])
def job(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Job:
    """A job whose output is on the disk or in a bucket."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    if request.param == "local":
        return Job(tmp_path, tiny_model("llama"), Storage.at(tmp_path / "out"))
    server: S3Server = request.getfixturevalue("s3")
    return Job(tmp_path, tiny_model("llama"), Storage.at(f"s3://{server.make_bucket()}/out", server.url))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_of_two_runs_at_once_one_is_refused_and_each_row_is_there_once(job: Job, seed: int) -> None:
    first = job.start()
    time.sleep(random.Random(seed).choice([0.0, 0.01, 0.1, 0.5]) if seed < 4 else random.Random(seed).uniform(0.5, 12))
    second = job.start()
    ends = {one.communicate(timeout=DEADLINE_S)[1]: one.returncode for one in (first, second)}
    refused = [said for said, status in ends.items() if status == REFUSED]
    assert sorted(ends.values()) == [0, REFUSED], ends
    assert "another run writes to output" in refused[0] or "already holds a finished job" in refused[0]
    job.check()


WRITE = """
import sys
import ray
import millrace.pipeline as mp
from millrace.engine.errors import OutputInUseError

model, output = sys.argv[1:]
ray.init("local", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
config = mp.EngineProcessorConfig(
    model_source=model, batch_size=16, engine_kwargs={"max_model_len": 64, "num_threads": 1},
    chat_template_stage=False, sampling_params={"max_tokens": 4, "temperature": 0},
)
processor = mp.build_llm_processor(
    config, preprocess=lambda row: {"prompt": f"row {row['id']}"}, postprocess=lambda row: {"id": row["id"]}
)
rows = ray.data.range(200)
print("ready", flush=True)
sys.stdin.readline()
try:
    mp.write_results(processor, rows, output, key=["id"], flush_interval_s=0.2)
except OutputInUseError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.soak
@pytest.mark.parametrize("gap_s", [0.0, 0.001, 0.005])
def test_of_two_processes_that_write_results_within_milliseconds_one_is_refused(
    tmp_path: Path, tiny_model: Callable[[str], Path], gap_s: float
) -> None:
    command = [sys.executable, "-P", "-c", WRITE, str(tiny_model("llama")), str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for one in processes:
        assert one.stdout.readline() == "ready\n", one.stderr.read()
    for one in processes:
        one.stdin.write("go\n")
        one.stdin.flush()
        time.sleep(gap_s)
    ends = {one.pid: (one.communicate(timeout=DEADLINE_S)[1], one.returncode) for one in processes}
    (writer,) = (pid for pid, (_, status) in ends.items() if status == 0)
    (said,) = (said for said, status in ends.values() if status == 1)
    assert f"refused: another run writes to output {str(tmp_path / 'out')!r}: process {writer} on" in said
    manifest = Manifest.read(Storage.at(tmp_path / "out"))
    assert manifest is not None
    ids = [id_ for one in manifest.files for id_ in pq.read_table(tmp_path / "out" / one.name)["id"].to_pylist()]
    assert sorted(ids) == list(range(200))


@pytest.mark.soak
def test_a_terminal_that_goes_away_ends_the_run_which_can_go_on(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    job = Job(tmp_path, tiny_model("llama"), Storage.at(tmp_path / "out"))
    ours, theirs = os.openpty()
    code = "import fcntl, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0)\n" + CLI
    run = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *job.arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "RAY_ADDRESS": "local"},
    )
    os.close(theirs)
    seen = b""
    while b"replicas up" not in seen:
        seen += os.read(ours, 1 << 16)
    os.close(ours)
    assert run.wait(timeout=DEADLINE_S) == STOPPED[signal.SIGHUP]
    assert Manifest.read(job.output) is None
    job.finish()
    job.check()


@pytest.mark.soak
@pytest.mark.parametrize("job", ["local"], indirect=True)
@pytest.mark.parametrize("seed", range(int(os.environ.get("MILLRACE_TEST_ROUNDS", "30"))))
def test_a_run_that_is_ended_at_any_moment_loses_and_doubles_no_row(job: Job, seed: int) -> None:
    draw = random.Random(seed)
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    first = job.start()
    time.sleep(draw.uniform(3, 15))
    second = job.start() if draw.random() < 0.5 else None
    time.sleep(draw.uniform(0, 2))
    first.send_signal(number)
    _, said = first.communicate(timeout=DEADLINE_S)
    # A signal that comes while Python itself starts ends the process by default, without a word.
    if number in STOPPED and first.returncode not in (0, -number):
        assert first.returncode == STOPPED[number], said
        assert "stopped" in said
    if second is not None:
        second.communicate(timeout=DEADLINE_S)
        assert second.returncode in (0, REFUSED)
    job.finish()
    job.check()
