"""`ray_session`: starts Ray for one job of the command line, without its logs, and shuts it down afterwards."""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import ray
import ray.data

from ..engine.env import ray_address, ray_folder
from ..engine.errors import ConfigError

STDERR = 2
MIN_CPUS = 2
"""Least number of CPUs that a local Ray is started with: a read task takes one CPU, and replicas share another."""

ANSWER_TIMEOUT_S = 5.0
"""Seconds that a cluster may take to accept a connection."""


def cluster_address() -> str | None:
    """Returns the address of a job's cluster: RAY_ADDRESS, or else a cluster that `ray start` left on this machine.

    The function tries to connect first, because Ray itself silently waits minutes for a cluster that has ended.

    Returns:
        The address for `ray.init`; None to start a local Ray for the job.

    Raises:
        ConfigError: No cluster answers at RAY_ADDRESS.
    """
    named = ray_address()
    if named is None:
        left = ray_folder() / "ray_current_cluster"  # the documentation of `ray.init` names this file
        started_here = left.read_text().strip() if left.exists() else None
        return started_here if started_here and _answers(started_here) else None
    if named == "local":
        return None
    if named != "auto" and not _answers(named):
        raise ConfigError(
            f"RAY_ADDRESS: no Ray cluster answers at {named!r}; correct it, or unset it for a Ray on this machine"
        )
    return named


def _answers(address: str) -> bool:
    """Returns whether a server accepts connections at ``"host:port"`` or ``"ray://host:port"``."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


class _LastingFile(io.FileIO):
    """A file that loses what cannot be written, because its terminal is gone, its pipe closed or its disk full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def lasting_stream(descriptor: int) -> TextIO:
    """Returns a text stream that closes its file descriptor, and in which no write fails.

    A job does not end because nobody sees its progress any more.

    Args:
        descriptor: Number of the file descriptor.
    """
    return io.TextIOWrapper(io.BufferedWriter(_LastingFile(descriptor, "w")), encoding="utf-8", line_buffering=True)


@contextmanager
def quiet_stderr(*, verbose: bool = False) -> Iterator[TextIO]:
    """Discards all output to the error stream during a block, even the output of native code.

    Ray's core is C++ and writes past `sys.stderr` and `logging`, so the file descriptor itself is redirected.

    Args:
        verbose: Whether to redirect nothing.

    Yields:
        The original error stream, for messages to the user. No write to it fails, see `lasting_stream`.
    """
    sys.stderr.flush()
    with lasting_stream(os.dup(STDERR)) as shown:
        if not verbose:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), STDERR)
        try:
            yield shown
        finally:
            sys.stderr.flush()
            os.dup2(shown.fileno(), STDERR)


@contextmanager
def ray_session(*, verbose: bool = False) -> Iterator[None]:
    """Runs a block with Ray connected to the cluster of `cluster_address`, or to a local Ray that ends with the block.

    Args:
        verbose: Whether the logs of Ray and of its workers are shown.

    Raises:
        ConfigError: No cluster answers at RAY_ADDRESS.
    """
    level = logging.INFO if verbose else logging.CRITICAL
    _start(level, verbose)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    # Loading a model or finishing a row may take longer than Ray Data's default limit without progress.
    context.execution_no_progress_timeout_s = -1
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        ray.shutdown()


def _start(level: int, verbose: bool) -> None:
    settings: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose}
    if (address := cluster_address()) is not None:
        ray.init(address, **settings)
        return
    if (os.cpu_count() or 1) < MIN_CPUS:
        settings["num_cpus"] = MIN_CPUS  # otherwise Ray counts the CPUs itself, with the limits of a container
    ray.init("local", include_dashboard=False, **settings)
