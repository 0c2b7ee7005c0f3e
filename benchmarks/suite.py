"""Runs the benchmarks for a GPU, the most important ones first, and ends when its time is over.

    python benchmarks/suite.py [--device cuda] [--time-limit 480] [--output FOLDER]

Every job is one of the scripts beside this file, in a process of its own, so that it has all of the memory. The JSON
lines go to `benchmarks.jsonl` as they come, and a plain table to the terminal at the end. A job that does not fit
into the time left is skipped, and a line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tables import tables

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Job:
    """One script to run.

    Attributes:
        command: The script and its arguments.
        least_s: Seconds that must be left to start the job.
        most_s: Seconds after which the job is stopped, so that time is left for the others.
    """

    command: tuple[str, ...]
    least_s: float
    most_s: float = 150.0


FP8 = ("--quantization", "fp8", "--kv-cache-dtype", "fp8")
GPU_JOBS = (
    Job(("kernels.py",), 10),
    Job(("offline.py", "--model", "qwen3-0.6b", "--workloads", "nano"), 30),
    Job(("offline.py", "--model", "qwen3-8b", "--workloads", "1024/1024"), 60),
    Job(("offline.py", "--model", "qwen3-8b", "--workloads", "1024/1024", *FP8), 50),
    Job(("offline.py", "--model", "qwen3-8b", "--workloads", "1024/1024", "--deterministic"), 60),
    Job(("offline.py", "--model", "qwen3-8b", "--workloads", "shared", "128/128", "2048/128"), 60),
    Job(("startup.py", "--model", "qwen3-0.6b", "--runs", "1"), 30),
    Job(("offline.py", "--engine", "transformers", "--model", "qwen3-0.6b", "--workloads", "nano"), 40),
    Job(("startup.py", "--model", "qwen3-8b", "--runs", "1"), 60),
    Job(("offline.py", "--model", "llama-3.1-8b", "--workloads", "1024/1024", *FP8), 50),
    Job(("offline.py", "--model", "qwen3-14b", "--workloads", "nano"), 50),
)
TINY_JOBS = (
    Job(("kernels.py", "--tiny", "--repeats", "1"), 0),
    Job(("offline.py", "--model", "tiny", "--workloads", "nano", "shared"), 0),
    Job(("offline.py", "--model", "tiny", "--workloads", "nano", *FP8), 0),
    Job(("offline.py", "--model", "tiny", "--workloads", "nano", "--deterministic"), 0),
    Job(("offline.py", "--model", "tiny", "--workloads", "nano", "--engine", "transformers"), 0),
    Job(("startup.py", "--model", "tiny", "--runs", "1"), 0),
)


def run(job: Job, device: str, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Runs a job and yields its lines as they come; the last line says so if the job failed or was stopped."""
    command = [sys.executable, str(HERE / job.command[0]), *job.command[1:], "--device", device]
    with tempfile.TemporaryFile("w+") as errors:
        # A session of its own, so that processes that the script has started end with it.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        timer = threading.Timer(timeout_s, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        printed = errors.read().strip()
    if code == -signal.SIGKILL:
        yield _remark(job, f"stopped after {timeout_s:.0f} s")
    elif code:
        print(printed, file=sys.stderr)
        yield _remark(job, printed.splitlines()[-1] if printed else "no message")


def _remark(job: Job, reason: str) -> dict[str, Any]:
    return {"benchmark": "suite", "command": " ".join(job.command), "failed": reason}


def lines(jobs: Sequence[Job], device: str, time_limit_s: float) -> Iterator[dict[str, Any]]:
    """Yields the lines of all jobs that fit into the time, and a remark for each that does not."""
    end = time.monotonic() + time_limit_s
    for job in jobs:
        left_s = end - time.monotonic()
        print(f"{left_s:4.0f} s left: {' '.join(job.command)}", file=sys.stderr, flush=True)
        if left_s < job.least_s:
            yield _remark(job, f"skipped: {left_s:.0f} s left, at least {job.least_s:.0f} s needed")
        else:
            yield from run(job, device, min(left_s, job.most_s))


def main() -> int:
    """Runs the jobs, writes the lines, prints the table; returns 1 if a job failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="jobs that only show that it works")
    parser.add_argument("--time-limit", type=float, default=480, metavar="SECONDS")
    parser.add_argument("--output", type=Path, default=Path("build"), metavar="FOLDER")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device; run it where there is one, or with --device cpu --tiny")
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    with (options.output / "benchmarks.jsonl").open("w", encoding="utf-8") as file:
        for row in lines(TINY_JOBS if options.tiny else GPU_JOBS, options.device, options.time_limit):
            print(json.dumps(row), file=file, flush=True)
            rows.append(row)
    print(tables(rows))
    return int(any("failed" in row and not row["failed"].startswith("skipped") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
