"""`EngineReplica`: an engine in a Ray actor. It takes requests and streams finished outputs back.

`EngineReplica` is a plain class, from which the supervisor makes an actor. All its methods are coroutines, so any
number of calls can be open at once. The engine runs on a thread of its own, and only that thread touches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from ...engine.errors import EngineDeadError, MillraceError
from ...engine.request import EngineOutput, Request
from .engine_thread import Engine, EngineThread, Submission
from .metrics import Meter
from .ranks import EngineFactory, RankInfo, RankMain, build_engine, run_rank
from .watchdog import StepWatchdog

Reference = ray.ObjectRef[Any]

METRICS_INTERVAL_S = 5.0
"""Seconds between two publications of the metrics of a replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSettings:
    """The settings of a replica. They can be pickled.

    Attributes:
        pool_name: Name of the pool.
        replica_id: Name of the replica, shown in front of its log lines.
        engine_kwargs: Keyword arguments of the engine.
        engine_factory: Function that makes the engine, in rank 0.
        rank_main: Function that the other ranks run.
        num_ranks: Number of ranks of the replica.
        num_sharing: Number of ranks that share the cores of a node.
        step_timeout_s: Most seconds of a step; None for no limit.
    """

    pool_name: str
    replica_id: str
    engine_kwargs: dict[str, Any]
    engine_factory: EngineFactory = build_engine
    rank_main: RankMain = run_rank
    num_ranks: int = 1
    num_sharing: int = 1
    step_timeout_s: float | None = None


class EngineReplica:
    """One engine in a Ray actor, which runs the requests of clients and is rank 0 of the engine.

    The model loads after construction, on the engine's thread; `ready` waits for it. When the engine itself fails, the
    process ends, and the supervisor starts another one.

        open -> draining -> open         the drain ends with `resume`
        open -> draining -> (killed)     the supervisor ends the process when no request is on board

    A draining replica hands new calls back: the streams of the calls end at once without outputs, and the client sends
    the requests to another replica. Calls with `in_quarantine` are an exception: a draining replica runs them.

    Args:
        settings: Settings of the replica.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        self._settings = settings
        watchdog = StepWatchdog(settings.step_timeout_s) if settings.step_timeout_s else None
        self._address: Future[str] = Future()
        self._engine = EngineThread(self._build, on_fatal=lambda: os._exit(1), watchdog=watchdog)
        self._meter = Meter(settings.pool_name, settings.replica_id)
        self._submissions: dict[Reference, set[Submission]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[Submission] = set()
        self._num_on_board = 0
        self._is_draining = False
        self._hands_back = False
        self._emptied = asyncio.Event()

    def __repr__(self) -> str:
        return f"EngineReplica({self._settings.replica_id})"

    async def address(self) -> str:
        """Waits until rank 0 has an address to which the other ranks connect, and returns it."""
        return await asyncio.wrap_future(self._address)

    async def ready(self) -> RankInfo:
        """Waits until the model is loaded.

        Returns:
            The process and node of rank 0.

        Raises:
            MillraceError: The model did not load. Any other kind of error becomes an `EngineDeadError` that names its
                type, because only our own errors can be unpickled in every process.
        """
        try:
            await asyncio.wrap_future(self._engine.loaded)
        except MillraceError:
            raise
        except Exception as exc:
            raise EngineDeadError(f"{type(exc).__name__}: {exc}") from exc
        if not self._tasks:
            self._keep(self._publish())
        return RankInfo(os.getpid(), ray.get_runtime_context().get_node_id())

    @ray.method(num_returns="streaming")
    async def generate(
        self, requests: list[Request], caller: Sequence[Reference] = (), in_quarantine: bool = False
    ) -> AsyncIterator[list[EngineOutput]]:
        """Runs requests and yields their outputs as they finish.

        Args:
            requests: Requests with different ids. A request that the engine refuses gives an output with an error.
            caller: At most one reference that never resolves and that the caller owns, in a list, because Ray would
                wait for a bare reference. When the caller dies, its unfinished requests are dropped. Without the
                reference they are dropped only if the call is cancelled.
            in_quarantine: Whether the caller has this replica to itself.

        Yields:
            The outputs that finished since the last time, at least one. A stream that ends before the last request
            hands the remaining requests back.
        """
        if self._is_draining and not in_quarantine:
            return
        arrived: asyncio.Queue[list[EngineOutput]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(outputs: list[EngineOutput]) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, outputs)

        submission = self._engine.submit(requests, deliver)
        num_left = len(requests)
        self._board(caller, submission, num_left)
        try:
            while num_left and self._goes_on(caller):
                chunk = await arrived.get()
                while not arrived.empty():
                    chunk += arrived.get_nowait()
                num_left -= len(chunk)
                self._num_on_board -= len(chunk)
                if chunk:
                    yield chunk
        finally:
            self._engine.abort(submission)
            self._leave(caller, submission, num_left)

    async def drain(self, timeout_s: float | None = None) -> None:
        """Hands new calls back from now on, and returns when no request is on board.

        Args:
            timeout_s: Seconds after which unfinished requests are handed back; None for no limit.
        """
        self._is_draining = True
        if not self._open:
            return
        self._emptied.clear()
        try:
            await asyncio.wait_for(self._emptied.wait(), timeout_s)
        except TimeoutError:
            self._hands_back = True
            for submission in self._open:
                submission.deliver([])
            await self._emptied.wait()

    async def resume(self) -> None:
        """Ends a drain: accepts requests again."""
        self._is_draining = self._hands_back = False

    async def load(self) -> int:
        """Returns how many requests are on board."""
        return self._num_on_board

    async def stats(self) -> tuple[Any, dict[str, float]]:
        """Returns the counters of the engine, read between two steps, and the metrics computed from them."""
        stats = await self._engine_stats()
        return stats, self._meter.read(stats)

    async def until_death(self) -> None:
        """Never returns. The supervisor awaits this call, which fails when this process dies."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Removes unfinished requests and closes the engine; the process stays until it is killed."""
        await asyncio.wrap_future(self._engine.close())

    def _build(self) -> Engine:
        settings = self._settings
        announce = self._address.set_result if settings.num_ranks > 1 else None
        engine = settings.engine_factory(settings.engine_kwargs, settings.num_sharing, announce)
        # What has been loaded stays until the end of this process, which is ours alone: a full collection of garbage
        # between two steps need not look through all of it.
        gc.collect()
        gc.freeze()
        return engine

    async def _engine_stats(self) -> Any:
        return await asyncio.wrap_future(self._engine.ask(lambda engine: engine.stats()))

    async def _publish(self) -> None:
        while True:
            self._meter.publish(await self._engine_stats())
            await asyncio.sleep(METRICS_INTERVAL_S)

    def _board(self, caller: Sequence[Reference], submission: Submission, count: int) -> None:
        self._open.add(submission)
        self._num_on_board += count
        for presence in caller:
            if presence not in self._submissions:
                self._submissions[presence] = set()
                self._keep(self._abort_after(presence))
            self._submissions[presence].add(submission)

    def _goes_on(self, caller: Sequence[Reference]) -> bool:
        return not self._hands_back and all(presence in self._submissions for presence in caller)

    def _leave(self, caller: Sequence[Reference], submission: Submission, num_left: int) -> None:
        self._num_on_board -= num_left
        for presence in caller:
            self._submissions.get(presence, set()).discard(submission)
        self._open.discard(submission)
        if not self._open:
            self._emptied.set()

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine as a task and stores the task until it ends; asyncio keeps only a weak reference."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _abort_after(self, presence: Reference) -> None:
        """Waits until the caller that owns `presence` dies, and then aborts the requests of all its calls."""
        with contextlib.suppress(RayError):
            await presence
        for submission in self._submissions.pop(presence):
            self._engine.abort(submission)
            submission.deliver([])
