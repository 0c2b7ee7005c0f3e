"""Runs a process and its descendants to their end, and measures the other use of the machine (Linux only)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
"""Linux: orphans among our descendants become our children, so that they can be counted and waited for."""

SAMPLE_S = 0.5
END_TIMEOUT_S = 30.0
"""Seconds in which the descendants of an ended process must end by themselves."""

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that has ended.

    Attributes:
        code: Exit status of the process.
        printed: Output of the process.
        started_s: Time of its start, seconds since the epoch.
        load: The machine's load average before its start.
        cpus: CPUs that it and its descendants used on average.
        other_cpus: CPUs that all other processes used on average.
    """

    code: int
    printed: str
    started_s: float
    load: float
    cpus: float
    other_cpus: float


@dataclass(slots=True)
class Family:
    """This process's descendants, and the CPU seconds of each when it was last seen.

    The seconds are sampled now and then: Ray's raylet ignores the end of its children, and the system does not add up
    the CPU time of children that their parent does not wait for.

    Attributes:
        alive: Descendants that ran at the last sample.
        cpu_s: CPU seconds by pid and start time.
    """

    alive: set[int] = field(default_factory=set)
    cpu_s: dict[tuple[int, int], float] = field(default_factory=dict)

    def sample(self) -> None:
        """Reads which descendants run, and their CPU seconds."""
        found: dict[int, tuple[int, int, float]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    parent, cpu_s = int(fields[1]), TICK_S * (int(fields[11]) + int(fields[12]))
                    found[int(entry.name)] = parent, int(fields[19]), cpu_s
        descendants: set[int] = set()
        newest = {os.getpid()}
        while newest:
            newest = {pid for pid, (parent, _, _) in found.items() if parent in newest}
            descendants |= newest
        self.alive = descendants
        self.cpu_s |= {(pid, found[pid][1]): found[pid][2] for pid in descendants}


def run_to_the_end(command: Sequence[str], environment: Mapping[str, str]) -> Finished:
    """Runs a command and waits for all of its descendants, so that the next command finds the machine idle.

    Args:
        command: The program and its arguments.
        environment: The environment of the program.

    Returns:
        The process, its output and the use of the machine.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    family = Family()
    with tempfile.TemporaryFile("w+") as printed:
        load, busy_s, started_s = os.getloadavg()[0], _busy_cpu_s(), time.time()
        process = subprocess.Popen(command, env=dict(environment), stdout=printed, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None:
            family.sample()
            time.sleep(SAMPLE_S)
        _wait_for_descendants(family)
        seconds = time.time() - started_s
        own_s, busy_s = sum(family.cpu_s.values()), _busy_cpu_s() - busy_s
        printed.seek(0)
        text = printed.read()
    return Finished(process.returncode, text, started_s, load, own_s / seconds, max(0.0, busy_s - own_s) / seconds)


def _wait_for_descendants(family: Family) -> None:
    """Waits until no descendant is left, and kills descendants that do not end in time."""
    end = time.monotonic() + END_TIMEOUT_S
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG) != (0, 0):
                continue
            family.sample()
            if time.monotonic() > end:
                for pid in family.alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


def _busy_cpu_s() -> float:
    """Returns the CPU seconds that the whole machine has worked: user, nice, system and interrupts."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    return TICK_S * sum(int(fields[i]) for i in (0, 1, 2, 5, 6))
