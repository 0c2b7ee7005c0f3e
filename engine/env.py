"""Environment variables: the only module that reads or sets any."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "JOB_PREFIX",
    "SPIN_COUNT",
    "STORAGE_TIMEOUT",
    "allow_equal_indices",
    "cache_folder",
    "hub_is_offline",
    "job_variables",
    "ray_address",
    "ray_folder",
    "s3_endpoint",
    "shorten_spinning",
    "storage_timeout",
    "use_modelscope",
]

SPIN_COUNT = 5000
"""Iterations for which an OpenMP thread spins before it sleeps, about 100 µs."""


JOB_PREFIX = "MILLRACE_JOB_"
"""Prefix of the variables that set a field of a job."""


def job_variables() -> dict[str, str]:
    """Returns the variables ``MILLRACE_JOB_...``, which set fields of a job: name -> value, sorted by name."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(JOB_PREFIX)}


STORAGE_TIMEOUT = "MILLRACE_STORAGE_TIMEOUT_S"
"""Variable with the longest silence, in seconds, within an answer of a remote store."""


def storage_timeout() -> str | None:
    """Returns the value of `MILLRACE_STORAGE_TIMEOUT_S`; None if it is not set."""
    return os.environ.get(STORAGE_TIMEOUT) or None


def cache_folder() -> Path:
    """Returns the folder for files that outlast a process: `millrace` in `XDG_CACHE_HOME`, or else in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace"


def use_modelscope() -> bool:
    """Returns whether models are downloaded from ModelScope: MILLRACE_USE_MODELSCOPE or VLLM_USE_MODELSCOPE is set."""
    return any(_is_on(name) for name in ("MILLRACE_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"))


def hub_is_offline() -> bool:
    """Returns whether HF_HUB_OFFLINE is set: models of a hub are then read from its cache only."""
    return _is_on("HF_HUB_OFFLINE")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def s3_endpoint() -> str | None:
    """Returns the endpoint of ``s3://`` URLs: AWS_ENDPOINT_URL_S3, or else AWS_ENDPOINT_URL; None if none is set."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def ray_address() -> str | None:
    """Returns the address of the Ray cluster, the value of `RAY_ADDRESS`; None if it is not set."""
    return os.environ.get("RAY_ADDRESS") or None


def ray_folder() -> Path:
    """Returns the folder in which Ray keeps its files on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray"


def shorten_spinning() -> None:
    """Makes OpenMP threads that wait for each other sleep early.

    The threads of a kernel wait for each other at its end. By default GNU OpenMP lets a waiting thread spin for
    milliseconds. If another process occupies a core, the spinning thread keeps its own core from the thread that it
    waits for (docs/decisions/0009-compiled-cpu-kernels.md has the cost).

    OpenMP reads the setting once, when torch loads it, so this must run before torch is imported. A value that the user
    has set is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def allow_equal_indices() -> None:
    """Lets torch share memory between GPUs of equal index.

    torch takes them for one GPU, and refuses. But a process that sees only its own GPU, as a Ray actor does, has it at
    index 0.
    """
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
