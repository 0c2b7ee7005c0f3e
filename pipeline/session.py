"""Ray for the command line: started for one job, quiet, and gone afterwards."""

from __future__ import annotations

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
"""CPUs that a local Ray is told to have at least: our operators hold shares of one, a read task takes a whole one."""

ANSWER_TIMEOUT_S = 5.0
"""How long a cluster may take to answer a call."""


def cluster_address() -> str | None:
    """Returns the cluster that a job runs on: what RAY_ADDRESS names, else what `ray start` has left running here.

    Ray itself waits minutes for a cluster that is gone, and says nothing.

    Returns:
        What `ray.init` takes as its address; None for a Ray of the job's own.

    Raises:
        ConfigError: Nothing answers where RAY_ADDRESS says.
    """
    named = ray_address()
    if named is None:
        left = ray_folder() / "ray_current_cluster"  # as the documentation of `ray.init` has it
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
    """Returns whether something listens at ``"host:port"`` or ``"ray://host:port"``."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def quiet_stderr(*, verbose: bool = False) -> Iterator[TextIO]:
    """Silences what native code writes to the error stream during a block.

    Ray's core is C++ and writes past `sys.stderr` and past `logging`, so the file descriptor itself is turned away.

    Args:
        verbose: Whether to leave it as it is.

    Yields:
        The error stream as it was: what is meant for the user goes there.
    """
    sys.stderr.flush()
    with os.fdopen(os.dup(STDERR), "w", encoding="utf-8", buffering=1) as shown:
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
    """Runs a block with Ray: the cluster of `cluster_address`, else one that ends with the block.

    Args:
        verbose: Whether Ray's logs and those of its workers are shown.

    Raises:
        ConfigError: Nothing answers where RAY_ADDRESS says.
    """
    level = logging.INFO if verbose else logging.CRITICAL
    _start(level, verbose)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    # A model may take longer to load, or a row to finish, than Ray Data waits for progress by itself.
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
        settings["num_cpus"] = MIN_CPUS  # else what Ray finds, which knows of containers
    ray.init("local", include_dashboard=False, **settings)
