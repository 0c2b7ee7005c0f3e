"""`LocalRanks`: starts the other ranks of an engine as processes on this host, for engines in a script.

A child process runs the same interpreter; its arguments say where this package is. Its standard input is a pipe,
through which it gets the settings. When the parent ends in any way, the kernel closes the pipe, and the child, which
watches the pipe, ends itself. So no process survives a `kill -9` of the parent.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from ..config import EngineConfig
from ..errors import EngineDeadError

logger = logging.getLogger(__name__)

__all__ = ["LocalRanks", "main"]

CLOSE_TIMEOUT_S = 10.0
"""Most seconds that a rank may take to end by itself."""

_BOOTSTRAP = """
import importlib, importlib.util, sys
name, folder = sys.argv[1:3]
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
importlib.import_module(name + ".engine.executor.launch").main()
"""
"""Imports the package by its path, because a checkout need not be installed, and not the caller's script."""


class LocalRanks:
    """The child processes on this host that run all ranks but rank 0; the constructor starts them.

    Args:
        config: Settings of the engine.
        address: Address of the `Rendezvous` of rank 0.
    """

    def __init__(self, config: EngineConfig, address: str) -> None:
        package = Path(__file__).resolve().parent.parent.parent
        name = __name__.split(".")[0]
        command = [sys.executable, "-P", "-c", _BOOTSTRAP, name, str(package)]
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, config.num_ranks):
            process = subprocess.Popen(command, stdin=subprocess.PIPE)
            self._processes.append(process)
            assert process.stdin is not None
            process.stdin.write(pickle.dumps((config, rank, address)))
            process.stdin.flush()

    @property
    def pids(self) -> list[int]:
        """Process ids in the order of ranks."""
        return [process.pid for process in self._processes]

    def check(self) -> None:
        """Checks that all processes are alive.

        Raises:
            EngineDeadError: A process has ended.
        """
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise EngineDeadError(
                    f"the process of rank {rank} ended with status {process.returncode} before it was ready; what it "
                    "wrote to standard error says why"
                )

    def close(self) -> None:
        """Closes the input of all processes, which makes them end, and kills processes that do not end in time."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> None:
    """Runs a rank with the settings from standard input: the entry point of a child process."""
    from .worker import run_worker

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # A terminal sends Ctrl-C to all ranks; rank 0 decides what happens then.
    config, rank, address = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with, args=(sys.stdin.buffer,), daemon=True).start()
    try:
        run_worker(config, rank, address, device_index=rank)
    except EngineDeadError:  # Rank 0 has got this error and raises it.
        os._exit(1)
    except Exception:
        logger.exception("rank %d failed", rank)
        os._exit(1)
    os._exit(0)  # Skips the usual exit, because work queued on a GPU may wait for ranks that have ended.


def _end_with(pipe: IO[bytes]) -> None:
    """Ends this process when the other end of a pipe is closed, so that it does not outlive rank 0."""
    pipe.read()
    os._exit(1)
