"""One engine in a Ray actor: requests in, finished outputs streamed out.

`EngineReplica` is a plain class that the supervisor makes an actor of. All its methods are coroutines, so that any
number of calls are open at once; the engine runs on its own thread and is never touched from here.
"""

from __future__ import annotations

import asyncio
import contextlib
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
"""Seconds between two publications of a replica's figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSettings:
    """What a replica is made from; it pickles.

    Attributes:
        pool_name: Its pool.
        replica_id: Its name, shown in front of its log lines.
        engine_kwargs: What `engine_factory` takes.
        engine_factory: Makes the engine, in rank 0.
        rank_main: What the other ranks run.
        num_ranks: Processes of the replica.
        num_sharing: Ranks that share this node's cores.
        step_timeout_s: Seconds a step may take; None for any time.
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
    """One engine in an actor.

    The model loads after construction, on the engine's thread; `ready` says how that went. When the engine itself
    fails, the process ends: its supervisor starts another one.

        open -> draining -> open         the drain ends with `resume`
        open -> draining -> (killed)     the supervisor ends the process when nothing is on board

    While it drains it hands new calls back: their streams end at once, with their requests unfinished, and the client
    takes these elsewhere. Calls in quarantine are the exception: they run while nothing else does.

    Args:
        settings: What it is made from.
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
        """Waits until this rank knows where the others are to come."""
        return await asyncio.wrap_future(self._address)

    async def ready(self) -> RankInfo:
        """Waits until the model is loaded.

        Returns:
            Where the replica runs.

        Raises:
            MillraceError: The model did not load. An error that is not of our tree is an `EngineDeadError` that names
                its type, so that it can cross to any process.
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
        """Runs requests and yields them as they finish.

        Args:
            requests: Requests with different ids. One that the engine refuses comes back with an error.
            caller: At most one reference that is never resolved and that the caller owns (in a list: Ray waits for a
                bare one). When its owner dies, what is unfinished is dropped. Without it, only cancelling drops it.
            in_quarantine: Whether the caller has this replica for itself.

        Yields:
            Whatever finished since the last time, at least one output. A stream that ends before the last request hands
            the rest back.
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
        """Takes in nothing more and returns when nothing is on board.

        Args:
            timeout_s: Seconds after which what is unfinished is handed back; None for as long as it takes.
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
        """Takes in requests again."""
        self._is_draining = self._hands_back = False

    async def load(self) -> int:
        """Returns how many requests are on board."""
        return self._num_on_board

    async def stats(self) -> tuple[Any, dict[str, float]]:
        """Returns the engine's counters, read between two steps, and the figures that follow from them."""
        stats = await self._engine_stats()
        return stats, self._meter.read(stats)

    async def until_death(self) -> None:
        """Never returns: the call fails when this process dies, which is how the supervisor learns of it."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Drops what is unfinished and frees what the engine holds; the process stays until it is killed."""
        await asyncio.wrap_future(self._engine.close())

    def _build(self) -> Engine:
        settings = self._settings
        announce = self._address.set_result if settings.num_ranks > 1 else None
        return settings.engine_factory(settings.engine_kwargs, settings.num_sharing, announce)

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
        """Starts a task and holds on to it: asyncio itself would not."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _abort_after(self, presence: Reference) -> None:
        """Waits for the end of a caller, one watch for all its calls, and drops what it has left here."""
        with contextlib.suppress(RayError):
            await presence
        for submission in self._submissions.pop(presence):
            self._engine.abort(submission)
            submission.deliver([])
