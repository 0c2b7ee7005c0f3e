"""One rank of an engine in a Ray actor, other than rank 0, which `EngineReplica` has."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future

import ray

from ...engine.errors import EngineDeadError, MillraceError
from .ranks import RankInfo
from .replica import ReplicaSettings
from .watchdog import StepWatchdog


class EngineWorker:
    """One rank in an actor. It takes its work from rank 0 directly; Ray's calls are for its start and its end.

    Args:
        settings: What the replica is made from.
        rank: Which rank, from 1.
    """

    def __init__(self, settings: ReplicaSettings, rank: int) -> None:
        self._settings = settings
        self._rank = rank

    def __repr__(self) -> str:
        return f"EngineWorker({self._settings.replica_id} rank {self._rank})"

    async def where(self) -> RankInfo:
        """Returns where the rank runs."""
        return RankInfo(os.getpid(), ray.get_runtime_context().get_node_id())

    async def run(self, address: str) -> None:
        """Loads this rank's part of the model and runs it until rank 0 closes the engine.

        Args:
            address: What rank 0 announced.

        Raises:
            MillraceError: The rank cannot load its part, or another one is gone. An error that is not of our tree is an
                `EngineDeadError` that names its type.
        """
        ended: Future[None] = Future()
        # A daemon, and not one of asyncio's threads: those would hold up the end of the process.
        threading.Thread(target=self._run, args=[address, ended], name="rank", daemon=True).start()
        await asyncio.wrap_future(ended)

    async def until_death(self) -> None:
        """Never returns: the call fails when this process dies, which is how the supervisor learns of it."""
        await asyncio.Event().wait()

    def _run(self, address: str, ended: Future[None]) -> None:
        settings = self._settings
        watchdog = StepWatchdog(settings.step_timeout_s, is_fatal=False) if settings.step_timeout_s else None
        try:
            settings.rank_main(settings.engine_kwargs, settings.num_sharing, self._rank, address, watchdog)
        except MillraceError as exc:
            ended.set_exception(exc)
        except Exception as exc:  # noqa: BLE001  # told to who waits for it, as an error that crosses to any process
            ended.set_exception(EngineDeadError(f"rank {self._rank}: {type(exc).__name__}: {exc}"))
        else:
            ended.set_result(None)
