"""Runs commands one after the other within a time limit, each in a process of its own, and goes on after a failure.

`run_steps` writes three things: a log with all that the commands print, a file of JSON lines with their results, and
one line a step to the terminal, which says what follows from its result.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tables import tables

ROOT = Path(__file__).resolve().parent.parent
LEAST_S = 3.0
"""Seconds that must be left to start a step."""
TRACE_S = 2.0
"""Seconds in which a process that is stopped prints where it was."""


@dataclass(frozen=True, slots=True)
class Step:
    """One command and what its result decides.

    Attributes:
        name: A few words, unique among the steps of a run.
        command: Arguments of Python: a script and its own arguments.
        limit_s: Seconds after which the step is stopped.
        passed: What follows if the command exits with 0.
        failed: What follows otherwise.
        otherwise: A command that runs in the rest of the step's time if the first fails by itself; empty for none.
        proofs: Names of earlier steps that must have passed, because the figures of this step count only then.
        skip: The reason why this machine cannot run the step; empty if it can.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    passed: str
    failed: str
    otherwise: tuple[str, ...] = ()
    proofs: tuple[str, ...] = ()
    skip: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a command.

    Attributes:
        result: "passed", "failed" (it exited with another status than 0), "stopped" (at its limit) or "skipped".
        printed: What it printed.
    """

    result: str
    printed: str

    @property
    def last_line(self) -> str:
        """The last line that is not empty: an error's message or a summary."""
        lines = [line for line in self.printed.splitlines() if line.strip() and not line.startswith("{")]
        return lines[-1].strip() if lines else ""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the JSON lines among what it printed; a line that was cut off is left out."""
        for line in self.printed.splitlines():
            if line.startswith("{"):
                with contextlib.suppress(json.JSONDecodeError):
                    yield {"benchmark": "other", **json.loads(line)}


def run_steps(steps: Sequence[Step], folder: Path, name: str, time_limit_s: float) -> int:
    """Runs all steps that fit into the time, and prints a table of their results.

    Args:
        steps: The steps, in order.
        folder: Gets `NAME.log` and `NAME.jsonl`.
        name: The name of the run.
        time_limit_s: Seconds for all steps together.

    Returns:
        0 if all steps that ran have passed, else 1: the exit status.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    (folder / f"{name}.log").unlink(missing_ok=True)
    # The log is appended to, because this process and those that it starts write to it.
    with (folder / f"{name}.log").open("a+", errors="replace") as log, (folder / f"{name}.jsonl").open("w") as data:
        for row in results(steps, log, environment(), time_limit_s):
            rows.append(row)
            print(json.dumps(row), file=data, flush=True)
    shown = [row for row in rows if "withheld" not in row]
    print(tables(sorted(shown, key=lambda row: row["benchmark"] == "steps")), flush=True)
    print(f"\nEverything that was printed: {log.name}; results as JSON lines: {data.name}")
    return int(any(row["result"] in ("failed", "stopped") for row in rows if row["benchmark"] == "steps"))


def results(
    steps: Sequence[Step], log: TextIO, environment: Mapping[str, str], time_limit_s: float
) -> Iterator[dict[str, Any]]:
    """Yields the lines of every step, and then one for the step itself; prints the latter for a person."""
    end = time.monotonic() + time_limit_s
    passed: set[str] = set()
    for number, step in enumerate(steps, 1):
        start = time.monotonic()
        finished = _run_step(step, log, environment, end)
        if finished.result == "passed":
            passed.add(step.name)
        missing = [proof for proof in step.proofs if proof not in passed]
        reason = {"withheld": f"not passed: {', '.join(missing)}"} if missing else {}
        yield from ({**row, "step": step.name, **reason} for row in finished.rows())
        row = _step_row(step, finished, time.monotonic() - start)
        if reason and finished.result == "passed":
            row["follows"] = f"its figures do not count; {reason['withheld']}"
        print(f"[{number}/{len(steps)}] {step.name:24} {row['result']:8} {row['seconds']:6.1f} s  {row['follows']}")
        if row["last_line"]:
            print(f"      {row['last_line'][:200]}")
        sys.stdout.flush()
        yield row


def _step_row(step: Step, finished: Finished, seconds: float) -> dict[str, Any]:
    follows = {"passed": step.passed, "skipped": finished.last_line}.get(finished.result, step.failed)
    return {
        "benchmark": "steps",
        "step": step.name,
        "result": finished.result,
        "seconds": round(seconds, 1),
        "follows": follows,
        "last_line": finished.last_line if finished.result in ("failed", "stopped") else "",
    }


def _run_step(step: Step, log: TextIO, environment: Mapping[str, str], end: float) -> Finished:
    """Runs the command of a step, and the other one if it fails; skips it if it cannot run or no time is left."""
    print(f"\n===== {step.name}", file=log, flush=True)
    if step.skip:
        return Finished("skipped", step.skip)
    end = min(end, time.monotonic() + step.limit_s)
    if end - time.monotonic() < LEAST_S:
        return Finished("skipped", "no time is left")
    finished = run(step.command, log, environment, end)
    if finished.result == "failed" and step.otherwise and end - time.monotonic() > LEAST_S:
        second = run(step.otherwise, log, environment, end)
        return Finished("failed", finished.printed + second.printed + f"\n{finished.last_line}")
    return finished


def run(command: Sequence[str], log: TextIO, environment: Mapping[str, str], end: float) -> Finished:
    """Runs one command until a time of `time.monotonic`; what it prints goes to the log while it runs.

    It writes to the file and not to a pipe, so that no process that it left behind can keep this one waiting.
    """
    print(f"$ python {' '.join(command)}", file=log, flush=True)
    start = log.seek(0, os.SEEK_END)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        result = _wait(process, end - TRACE_S)
        log.seek(start)
        printed = log.read()  # without the stacks that a stopped process prints
        if result == "stopped":
            _stop(process)
    finally:
        _signal(process, signal.SIGKILL)  # and all processes that it started
    return Finished(result, printed)


def _wait(process: subprocess.Popen[bytes], end: float) -> str:
    try:
        return "failed" if process.wait(max(0.0, end - time.monotonic())) else "passed"
    except subprocess.TimeoutExpired:
        return "stopped"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process group. Python first prints the stack of every thread (PYTHONFAULTHANDLER), to show what hung."""
    _signal(process, signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(TRACE_S)
    _signal(process, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # A process that waits for a broken driver may not end.
        process.wait(TRACE_S)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def environment() -> dict[str, str]:
    """Returns the environment of the commands: the checkout as `millrace`, and a cache of compiled kernels in it."""
    build = ROOT / "build"
    link = build / "path" / "millrace"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(Path("..", ".."))
    paths = [str(link.parent), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    return {"TRITON_CACHE_DIR": str(build / "triton"), **os.environ, **own}
