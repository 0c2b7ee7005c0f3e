"""`EngineWorker`: a Ray actor with one rank of an engine. Rank 0 is in `EngineReplica`."""

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
    """A rank other than 0 of an engine, in a Ray actor. Calls of Ray only start and end it; rank 0 sends it the steps.

    Args:
        settings: Settings of the replica.
        rank: The rank, 1 or more.
    """

    def __init__(self, settings: ReplicaSettings, rank: int) -> None:
        self._settings = settings
        self._rank = rank

    def __repr__(self) -> str:
        return f"EngineWorker({self._settings.replica_id} rank {self._rank})"

    async def where(self) -> RankInfo:
        """Returns the process and node of the rank."""
        return RankInfo(os.getpid(), ray.get_runtime_context().get_node_id())

    async def run(self, address: str) -> None:
        """Loads this rank's part of the model and runs it until rank 0 closes the engine.

        Args:
            address: The address that rank 0 announced.

        Raises:
            MillraceError: The rank cannot load its part of the model, or another rank is gone. Any other kind of error
                becomes an `EngineDeadError` that names its type.
        """
        ended: Future[None] = Future()
        # A daemon thread, because the process would wait for a thread of asyncio's pool before it ends.
        threading.Thread(target=self._run, args=[address, ended], name="rank", daemon=True).start()
        await asyncio.wrap_future(ended)

    async def until_death(self) -> None:
        """Never returns. The supervisor awaits this call, which fails when this process dies."""
        await asyncio.Event().wait()

    def _run(self, address: str, ended: Future[None]) -> None:
        settings = self._settings
        watchdog = StepWatchdog(settings.step_timeout_s, is_fatal=False) if settings.step_timeout_s else None
        try:
            settings.rank_main(settings.engine_kwargs, settings.num_sharing, self._rank, address, watchdog)
        except MillraceError as exc:
            ended.set_exception(exc)
        except Exception as exc:  # noqa: BLE001 - the caller gets it as an error that can be unpickled in every process
            ended.set_exception(EngineDeadError(f"rank {self._rank}: {type(exc).__name__}: {exc}"))
        else:
            ended.set_result(None)
