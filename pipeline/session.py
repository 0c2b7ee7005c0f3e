"""Ray for the command line: started for one job, quiet, and gone afterwards."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import ray
import ray.data

STDERR = 2
MIN_CPUS = 2
"""CPUs that a local Ray is told to have at least: our operators hold shares of one, a read task takes a whole one."""


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
    """Runs a block with Ray: the cluster that `RAY_ADDRESS` names, else a local one.

    Args:
        verbose: Whether Ray's logs and those of its workers are shown.
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
    settings: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose, "include_dashboard": False}
    if (os.cpu_count() or 1) < MIN_CPUS:
        # Only said where it is needed: a cluster that is there already knows its own number.
        settings["num_cpus"] = MIN_CPUS
    ray.init(**settings)
