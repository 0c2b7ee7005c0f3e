"""Runs a process to its end, with all that it starts, and says what else used the machine meanwhile (Linux only)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
"""Linux: what our descendants leave behind becomes ours, so that it can be waited for and counted."""

END_TIMEOUT_S = 30.0
"""Seconds that what a process leaves behind has to end by itself."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that has ended.

    Attributes:
        code: Its exit status.
        stdout: What it printed.
        stderr: What it printed there.
        started_s: When it was started, seconds since the epoch.
        load: The machine's load average before that.
        cpus: CPUs that it and its descendants used on average.
        other_cpus: CPUs that everything else used on average.
    """

    code: int
    stdout: str
    stderr: str
    started_s: float
    load: float
    cpus: float
    other_cpus: float


def run_to_the_end(command: Sequence[str], environment: Mapping[str, str]) -> Finished:
    """Runs a command and waits for all of its descendants, so that the next one finds the machine as this one did.

    Args:
        command: The program and its arguments.
        environment: Its environment.

    Returns:
        What became of it.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    load, started_s = os.getloadavg()[0], time.time()
    own_before, busy_before = _own_cpu_s(), _busy_cpu_s()
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    _wait_for_descendants()
    seconds = time.time() - started_s
    own_s, busy_s = _own_cpu_s() - own_before, _busy_cpu_s() - busy_before
    return Finished(
        done.returncode, done.stdout, done.stderr, started_s, load, own_s / seconds, max(0.0, busy_s - own_s) / seconds
    )


def _wait_for_descendants() -> None:
    """Returns when none is left; those that do not end in time are killed."""
    end = time.monotonic() + END_TIMEOUT_S
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG) != (0, 0):
                continue
            if time.monotonic() > end:
                for pid in _children():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def _children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def _own_cpu_s() -> float:
    """Returns the CPU seconds of this process and of all descendants that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _busy_cpu_s() -> float:
    """Returns the CPU seconds that the whole machine has worked: user, nice, system and interrupts."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    return sum(int(fields[i]) for i in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")
