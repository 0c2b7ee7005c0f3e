"""Environment variables: the one place where any is read or set."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "JOB_PREFIX",
    "SPIN_COUNT",
    "STORAGE_TIMEOUT",
    "job_variables",
    "ray_address",
    "ray_folder",
    "s3_endpoint",
    "shorten_spinning",
    "storage_timeout",
]

SPIN_COUNT = 5000
"""Turns of the loop in which a thread waits for the others, before it sleeps: some 100 µs."""


JOB_PREFIX = "MILLRACE_JOB_"
"""How the names of variables begin that stand for a field of a job."""


def job_variables() -> dict[str, str]:
    """Returns the variables that stand for fields of a job: name -> value, in the order of their names."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(JOB_PREFIX)}


STORAGE_TIMEOUT = "MILLRACE_STORAGE_TIMEOUT_S"
"""Longest silence, in seconds, within an answer of a store behind a URL."""


def storage_timeout() -> str | None:
    """Returns what the user has set for that, if anything."""
    return os.environ.get(STORAGE_TIMEOUT) or None


def s3_endpoint() -> str | None:
    """Returns where the user says that ``s3://`` leads, under the names that Amazon's libraries know."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def ray_address() -> str | None:
    """Returns the cluster that the user names for Ray, if any."""
    return os.environ.get("RAY_ADDRESS") or None


def ray_folder() -> Path:
    """Returns where Ray keeps its files on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray"


def shorten_spinning() -> None:
    """Has the threads of a kernel sleep soon when they wait for each other.

    They meet at the end of every kernel. By default (GNU OpenMP) one that waits spins for milliseconds and keeps its
    core from whom it waits for, if another process has that one's core (docs/decisions/0009-compiled-cpu-kernels.md has
    what that costs).

    OpenMP reads it once, when torch loads it, so this must run before torch is imported. What the user has set counts.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
