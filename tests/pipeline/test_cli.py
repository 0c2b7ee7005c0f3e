"""The command line: mistakes, exit statuses, and no traceback. Nothing here starts Ray."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import millrace
from checkpoints import tiny_checkpoint
from millrace import ConfigError, EngineDeadError
from millrace.pipeline import cli
from millrace.pipeline.commands import running
from millrace.pipeline.commands.check import read_prompts
from millrace.pipeline.commands.quantize import read_column
from millrace.pipeline.commands.stopping import Stopping, stop_on_signals
from millrace.pipeline.errors import find_cause
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.job.display import describe_progress, describe_summary
from millrace.pipeline.job.folder import JobFolder
from millrace.pipeline.job.progress import Progress
from millrace.pipeline.ledger.claim import Claim
from millrace.pipeline.ledger.counts import ErrorKind
from millrace.pipeline.report import JobSummary


def command(*args: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from millrace.pipeline.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *args], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Path:
    """A folder with a job's input and model."""
    pq.write_table(pa.table({"id": [1, 2], "line": ["a", "b"]}), tmp_path / "in.parquet")
    (tmp_path / "typo.yaml").write_text("model: model\ninput: in.parquet\noutput: out\npromt: x\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.parquet").touch()
    return tmp_path


EMBED = ["embed", "in.parquet", "out", "--model", "bundled:invoices"]
FLAGS = ["run", "--model", "model", "--input", "in.parquet", "--output", "out", "--prompt", "{line}"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run", "nowhere.yaml"], "job file 'nowhere.yaml' cannot be read"),
        (["run", "typo.yaml"], "typo.yaml:4: JobConfig has no field 'promt'; did you mean 'prompt'?"),
        (["run"], "pass a job file, or --model"),
        ([*FLAGS, "--model", "facebook/opt-125m"], "is no local folder, and"),
        ([*FLAGS, "--input", "nowhere.parquet"], "nowhere.parquet' does not exist"),
        ([*FLAGS, "--prompt", "{lin}"], "no column 'lin'; did you mean 'line'?"),
        ([*FLAGS, "--output", "full"], "pass another folder"),
        (["resume", "model"], "is no output folder of a job"),
        (["check", "nowhere"], "model 'nowhere'"),
        (["check", "model", "--prompts", "nowhere.txt"], "--prompts 'nowhere.txt' cannot be read"),
        (["retry-failed", "nowhere"], "is no output folder of a job"),
        ([*FLAGS, "--temperature", "9"], "temperature must be a number from 0 to 2"),
        ([*EMBED, "--column", "lines"], "the input has no column 'lines'; did you mean 'line'?"),
        ([*EMBED, "--column", "line", "--dimensions", "0"], "dimensions must be an integer of at least 1; got 0"),
        ([*EMBED, "--engine", "max_num_seq=4"], "the engine has no field 'max_num_seq'; did you mean"),
        ([*EMBED, "--engine", "eager"], "--engine takes KEY=VALUE"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    folder: Path, args: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # A hub that cannot be reached is no mistake of the user.
    done = command(*args, folder=folder)
    assert done.returncode == running.EXIT_USER_ERROR
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "out").exists()


DEEP = {str(at): {"$ref": f"#/$defs/{at + 1}"} for at in range(3000)}
RULES = "\n".join(["start: r0", *(f"r{at}: r{at + 1}" for at in range(10_000)), 'r10000: "a"'])


@pytest.mark.parametrize(
    "constraint", [{"json": {"$ref": "#/$defs/0", "$defs": DEEP}}, {"grammar": RULES}], ids=["schema", "grammar"]
)
def test_a_constraint_that_would_end_the_process_is_a_mistake_of_the_job(folder: Path, constraint: dict) -> None:
    job = {"model": "model", "input": "in.parquet", "output": "out", "sampling": {"structured_outputs": constraint}}
    (folder / "job.yaml").write_text(json.dumps(job))
    done = command("plan", "job.yaml", folder=folder)
    assert done.returncode == running.EXIT_USER_ERROR
    assert f"job.yaml:1: sampling: structured_outputs.{next(iter(constraint))} cannot be compiled" in done.stderr
    assert len(done.stderr) < 1500
    assert len(done.stderr.splitlines()) == 1


def test_check_compares_a_model_with_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "prompts.txt").write_text("The mill\n\nRows stream in\n")
    asked = ["check", "bundled:invoices", "--prompts", "prompts.txt", "--max-tokens", "2"]
    asked += ["--engine", "model_impl=transformers"]
    done = command(*asked, folder=folder)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    assert "same tokens for 4 of 4 outputs" in done.stdout
    strict = command(*asked, "--tolerance", "0", "--json", folder=folder)
    assert strict.returncode == 1
    assert json.loads(strict.stdout)["max_logprob_error"] > 0


def test_prompts_of_a_file_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "prompts.JSONL"
    file.write_text('\ufeff{"prompt": "a\u2028b"}\r\n\n{"prompt": "c"}', encoding="utf-8")
    assert read_prompts(file) == ["a\u2028b", "c"]
    file.write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(file)


def test_the_version_is_shown_without_ray_or_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from millrace.pipeline.cli import app; app(['--version'], standalone_mode=False); "
        "sys.exit(bool({'ray', 'torch', 'transformers', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.split() == ["millrace", millrace.__version__]


def test_the_face_of_the_pipeline_is_light() -> None:
    code = (
        "import sys, millrace.pipeline as p; assert p.__all__ == sorted(p.__all__); "
        "sys.exit(bool({'ray', 'torch', 'transformers', 'pydantic', 'pyarrow'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def summary(**changes: object) -> JobSummary:
    fields = {
        "model": "m", "output": "out", "num_rows_in": 3, "num_rows_out": 3, "num_rows_failed": 0,
        "num_input_tokens": 30, "num_cached_tokens": 10, "num_output_tokens": 60, "start_up_s": 1.0,
        "generate_s": 2.0, "write_s": 0.5, "finish_reasons": {"stop": 3}, "errors": {},
    }  # fmt: skip
    return JobSummary(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "status"),
    [({}, 0), ({"num_rows_failed": 1}, running.EXIT_ROWS_FAILED), ({"num_rows_out": 2}, running.EXIT_FAILED)],
)
def test_the_status_says_whether_every_row_got_through(
    changes: dict[str, int], status: int, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(running, "run", lambda *args, **kwargs: summary(**changes))
    with pytest.raises(SystemExit) as caught:
        cli.app(FLAGS)
    assert caught.value.code == status


@pytest.mark.parametrize("has_begun", [True, False])
def test_an_error_of_the_job_is_status_1(
    has_begun: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        if has_begun:
            (folder / "out").mkdir()
        raise EngineDeadError("no replica is left")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(running, "run", fail)
    with pytest.raises(SystemExit) as caught:
        cli.app(FLAGS)
    assert caught.value.code == running.EXIT_FAILED
    advice = f"; what has finished is kept, go on with: millrace resume {folder / 'out'}" if has_begun else ""
    assert capfd.readouterr().err == f"error: no replica is left{advice}\n"


def test_a_message_shows_control_characters_and_obeys_none(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        logging.getLogger(running.__name__).warning("a file of \x1b[2J\r rows")
        raise EngineDeadError("\x1b]0;owned\x07 [bold]\nline 2 \u202e")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(running, "run", fail)
    with pytest.raises(SystemExit):
        cli.app(FLAGS)
    shown = capfd.readouterr().err.splitlines()
    assert shown == [
        r"WARNING: a file of \x1b[2J\r rows",
        r"error: \x1b]0;owned\x07 [bold]",
        r"line 2 \u202e",
    ]


WAITING = """
import sys, time
from millrace.pipeline import cli
from millrace.pipeline.commands import running
from millrace.pipeline.commands.check import read_prompts
from millrace.pipeline.commands.quantize import read_column

def wait(prepared, *args, **kwargs):
    prepared.folder.write_state(prepared.state)
    print("waiting", flush=True)
    time.sleep(600)

running.run = wait
cli.main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_stops_the_job_and_says_how_to_go_on(folder: Path, number: int, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *FLAGS], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert said == f"stopped; what has finished is kept, go on with: millrace resume {folder / 'out'}\n"


BECOME_LEADER = "import fcntl, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0)\n"

SHOWING = """
import signal, sys, time
from types import SimpleNamespace
from millrace.pipeline import cli
from millrace.pipeline.commands import running
from millrace.pipeline.commands.check import read_prompts
from millrace.pipeline.commands.quantize import read_column
from millrace.pipeline.job.display import ProgressView
from millrace.pipeline.job.progress import Progress
from millrace.pipeline.ledger.claim import Claim

def show(prepared, *args, console, **kwargs):
    prepared.folder.write_state(prepared.state)
    lines = sys.stdin
    with Claim.held(prepared.folder.writers, "out"), ProgressView(console) as view:
        for done in range(10**9):
            view.show(Progress("running", 2, done, 0, 1.0, 1.0, 1.0, 1.0))
            if done == 20:
                print("showing", flush=True)
            if done > 20 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not lines.readline():
                break
            time.sleep(0.01)
        view.show(Progress("running", 2, 2, 0, 1.0, 1.0, 1.0, 1.0))
    return SimpleNamespace(is_complete=True, num_rows_failed=0)

running.run = show
running._job_kind = lambda: running.JobKind(None, lambda summary: "done", lambda prepared: "the same command")
cli.main()
"""


@pytest.mark.parametrize(("ignores", "status"), [(False, 129), (True, 0)])
def test_a_terminal_that_is_gone_ends_the_job_cleanly_or_not_at_all(folder: Path, ignores: bool, status: int) -> None:
    """The system sends SIGHUP, and every write to the terminal fails from then on."""
    ours, theirs = os.openpty()
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores else signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", BECOME_LEADER + SHOWING, *FLAGS],
            cwd=folder, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGHUP, handler)
    os.close(theirs)
    seen = b""
    while b"showing" not in seen:
        seen += os.read(ours, 1 << 16)
    os.close(ours)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == status
    assert JobFolder(Storage.at(folder / "out")).read_state() is not None
    assert [one.name for one in (folder / "out" / "_millrace").iterdir()] == ["job.json"]


def test_the_status_is_that_of_the_first_signal_whatever_exception_ray_makes_of_it() -> None:
    for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        with stop_on_signals() as stopping:
            for one in (number, signal.SIGTERM):
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(one)
        assert stopping.status(KeyboardInterrupt()) == status
    assert Stopping().status(KeyboardInterrupt()) == 130
    assert Stopping().status(SystemExit(15)) == 143, "Ray's handler of SIGTERM, while Ray starts"


def test_a_signal_that_was_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    former, of_term = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == of_term
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_second_run_of_an_output_is_refused_with_status_2_before_ray_starts(folder: Path) -> None:
    with Claim.held(JobFolder(Storage.at(folder / "out")).writers, "out"):
        refused = command(*FLAGS, folder=folder)
    assert refused.returncode == running.EXIT_USER_ERROR
    assert f"another run writes to output '{folder / 'out'}': process {os.getpid()} on" in refused.stderr
    assert "--take-over" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_the_line_of_progress_says_what_one_wants_to_know() -> None:
    text = describe_progress(Progress("running", 6000, 1500, 2, 12_345.6, 789.0, 65.0, 195.0))
    assert text == "1,500/6,000 rows, 2 failed, 12,346 tok/s in, 789 tok/s out, 1:05 gone, ETA 3:15"


def test_the_summary_says_what_failed_with_an_example() -> None:
    errors = {"generate: PromptTooLongError": ErrorKind(2, "generate: PromptTooLongError: 300 tokens [of 200]")}
    text = describe_summary(summary(num_rows_failed=2, errors=errors))
    assert "3 in, 3 out, 2 failed" in text
    assert "2 x generate: PromptTooLongError: 300 tokens \\[of 200]" in text
    assert "15 tok/s in, 30 tok/s out" in text


def test_an_error_of_a_worker_is_shown_without_the_errors_of_ray_around_it() -> None:
    from ray.exceptions import RayTaskError, UserCodeException

    inner = OSError(28, "No space left on device")
    outer = UserCodeException("MapWorker(Prepare) failed")
    outer.__cause__ = RayTaskError("ray::MapWorker()", "Traceback ...", inner).as_instanceof_cause()
    assert find_cause(outer) is inner
    alone = RayTaskError("ray::MapWorker()", "Traceback ...", None)
    assert find_cause(alone) is alone


def test_quantize_writes_a_folder_and_says_what_it_cost(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", "llama")
    rows = [{"line": f"Rows stream in {i}, and results stream out."} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "nulls.jsonl").write_text('{"line": null, "text": ""}\n' * 3)
    args = ["quantize", "model", "out", "--scheme", "w8a8", "--calibration", "rows.jsonl"]
    done = command(*args, folder=tmp_path)
    assert done.returncode == 2
    assert "has no column 'messages or text or prompt'; pass --column, one of line" in done.stderr
    with pytest.raises(ConfigError, match="has no rows, or only null ones, in column 'line'"):
        read_column(str(tmp_path / "nulls.jsonl"), "line")
    done = command(*args, "--column", "line", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "in w8a8, rounded for the calibration rows (GPTQ)" in done.stdout
    assert "before" in done.stdout and "tokens that were not used to round" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"
