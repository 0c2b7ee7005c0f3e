"""The actor that owns a pool's replicas: starts them, hears of their deaths, starts them again, or gives up.

It takes no CPU and sees no row: clients ask it only which replicas there are. It is owned by the driver and owns the
replicas; nothing is detached, so when a driver dies, however it dies, Ray ends them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential

from ..engine.errors import EngineDeadError, RequestError, UserError
from .config import PoolConfig
from .placement import replicas_per_node
from .replica import EngineReplica, ReplicaInfo
from .stats import PoolState, PoolStats, ReplicaState, ReplicaStats

logger = logging.getLogger(__name__)

NAMESPACE = "millrace"
"""Ray namespace of the supervisors, so that a client finds its pool from whatever namespace it runs in."""

MAX_CALLS = 100_000
"""Open calls an actor takes. They are coroutines that wait: a limit that is reached would only block someone."""

MAX_BACKOFF_S = 60.0
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ReplicaHandle:
    """A replica that is ready.

    Attributes:
        replica_id: Its name; a restarted replica has another one.
        actor: Ray's handle of it.
    """

    replica_id: str
    actor: Any


@dataclass(frozen=True, slots=True)
class PoolView:
    """What a client needs to know of a pool.

    Attributes:
        version: Counts the changes.
        state: As in `PoolStats`.
        failure: Why a replica was given up; None if none was.
        max_attempts: As in `PoolConfig`.
        replicas: Those that are ready.
    """

    version: int
    state: PoolState
    failure: RequestError | None
    max_attempts: int
    replicas: tuple[ReplicaHandle, ...]


@dataclass(slots=True, eq=False)
class Slot:
    """A place for one replica at a time.

        starting -> ready -> dead -> starting ...        each start with back-off between its failures
        starting -> failed                               for good, after too many failures in a row

    Attributes:
        index: Which of the pool's places.
        state: Where in the drawing above.
        num_restarts: Times it went from dead to starting.
        actor: The replica, once it was created.
        info: Where that runs; None unless it is ready.
    """

    index: int
    state: ReplicaState = "starting"
    num_restarts: int = 0
    actor: Any = None
    info: ReplicaInfo | None = None

    @property
    def replica_id(self) -> str:
        """Name of the replica that is or will be here."""
        return f"{self.index}.{self.num_restarts}"

    def stats(self) -> ReplicaStats:
        """Returns what there is to tell without asking the engine."""
        place = (self.info.pid, self.info.node_id) if self.info else (None, None)
        return ReplicaStats(self.replica_id, self.state, self.num_restarts, *place)


class Supervisor:
    """Keeps the replicas of one pool alive.

    Args:
        name: Name of the pool.
        config: Its settings.
    """

    def __init__(self, name: str, config: PoolConfig) -> None:
        self._name = name
        self._config = config
        self._slots = [Slot(index) for index in range(config.num_replicas)]
        self._tasks: list[asyncio.Task[None]] = []
        self._version = 0
        self._failure: RequestError | None = None
        self._is_closed = False
        self._changed = asyncio.Condition()

    def __repr__(self) -> str:
        return f"EnginePool({self._name})"

    async def start(self) -> None:
        """Begins to start the replicas and returns at once."""
        self._tasks = [asyncio.create_task(self._keep_alive(slot)) for slot in self._slots]

    async def view(self, newer_than: int = -1) -> PoolView:
        """Waits for a change.

        Args:
            newer_than: A version the caller has seen; -1 returns at once.

        Returns:
            The pool as it is now, of a later version.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._version > newer_than)
            return self._view()

    async def until_settled(self) -> PoolView:
        """Waits until each replica is ready or given up.

        Returns:
            The pool as it is then.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._is_closed or all(slot.state in ("ready", "failed") for slot in self._slots)
            )
            return self._view()

    async def presence(self) -> None:
        """Never returns. Its result, which never comes, belongs to the caller: who waits for it hears of its death."""
        await asyncio.Event().wait()

    async def stats(self, with_engines: bool) -> PoolStats:
        """Describes the pool.

        Args:
            with_engines: Whether to ask each ready replica for its engine's counters, which it reads between two steps.

        Returns:
            The pool and its replicas.
        """
        replicas = await asyncio.gather(*(self._replica_stats(slot, with_engines) for slot in self._slots))
        reason = _reason(self._failure) if self._failure else None
        return PoolStats(self._name, self._state(), reason, os.getpid(), list(replicas))

    async def close(self) -> None:
        """Ends all replicas and returns when they are gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._is_closed = True
        await asyncio.gather(*(_end(slot.actor) for slot in self._slots if slot.actor is not None))
        await self._tell()

    def _state(self) -> PoolState:
        states = {slot.state for slot in self._slots}
        if self._is_closed:
            return "closed"
        if "ready" in states:
            return "ready"
        return "failed" if states == {"failed"} else "starting"

    def _view(self) -> PoolView:
        ready = tuple(ReplicaHandle(slot.replica_id, slot.actor) for slot in self._slots if slot.state == "ready")
        return PoolView(self._version, self._state(), self._failure, self._config.max_attempts, ready)

    async def _replica_stats(self, slot: Slot, with_engine: bool) -> ReplicaStats:
        stats = slot.stats()
        if not with_engine or slot.state != "ready":
            return stats
        try:
            return dataclasses.replace(stats, engine=await slot.actor.stats.remote())
        except RayError:  # It died just now; the next call says so.
            return stats

    async def _tell(self) -> None:
        async with self._changed:
            self._version += 1
            self._changed.notify_all()

    async def _keep_alive(self, slot: Slot) -> None:
        while True:
            try:
                await self._start(slot)
            except Exception as exc:  # noqa: BLE001 - whatever keeps a replica from starting is the reason to give it up
                await self._give_up(slot, exc)
                return
            slot.state = "ready"
            await self._tell()
            cause = await _death(slot.actor)
            logger.warning("replica %s died and starts again: %s", slot.replica_id, cause)
            slot.state, slot.info = "dead", None
            await self._tell()
            slot.num_restarts += 1
            slot.state = "starting"

    async def _start(self, slot: Slot) -> None:
        """Starts the replica of a slot, again after a failure, with exponential back-off.

        Raises:
            Exception: The last failure, when there were too many, or the first that would always come again.
        """
        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(self._config.max_start_failures),
            wait=wait_exponential(multiplier=self._config.start_backoff_s, max=MAX_BACKOFF_S),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        ):
            with attempt:
                slot.info = await self._start_once(slot)

    async def _start_once(self, slot: Slot) -> ReplicaInfo:
        slot.actor = self._create(slot.replica_id)
        try:
            info: ReplicaInfo = await slot.actor.ready.remote()
        except RayError as exc:
            ray.kill(slot.actor)
            if isinstance(exc, RayTaskError):
                raise exc.cause from None
            raise EngineDeadError(f"its process ended while the model was loading: {_one_line(exc)}") from None
        return info

    def _create(self, replica_id: str) -> Any:
        config = self._config
        options = {
            "num_cpus": config.num_cpus_per_replica,
            "num_gpus": config.num_gpus_per_replica,
            "accelerator_type": config.accelerator_type,
            "runtime_env": config.runtime_env,
            "max_concurrency": MAX_CALLS,
            # Ray would fill a node to the half before it takes the next one, and leave the cores of that idle.
            "scheduling_strategy": "SPREAD",
        }
        replica: Any = ray.remote(EngineReplica)
        num_sharing = replicas_per_node(config)
        return replica.options(**options).remote(replica_id, config.engine_kwargs, config.engine_factory, num_sharing)

    async def _give_up(self, slot: Slot, error: Exception) -> None:
        slot.state = "failed"
        self._failure = RequestError.from_exception(error)
        logger.error("replica %s does not start and is given up: %s", slot.replica_id, _reason(self._failure))
        await self._tell()


def _may_pass(error: BaseException) -> bool:
    """Returns whether another start may succeed; being cancelled is no failure, and a user's error stays."""
    return isinstance(error, Exception) and not isinstance(error, UserError)


async def _death(actor: Any) -> str:
    """Waits until a replica is dead, or out of reach, which is made the same, and says why."""
    try:
        await actor.until_death.remote()
    except RayError as exc:
        ray.kill(actor)
        return _one_line(exc)
    raise AssertionError("until_death returned")


async def _end(actor: Any) -> None:
    """Closes the engine of a replica if it answers in time, kills its process, and waits until that is gone."""
    with contextlib.suppress(RayError, TimeoutError):
        await asyncio.wait_for(actor.close.remote(), CLOSE_TIMEOUT_S)
    gone = actor.until_death.remote()
    ray.kill(actor)
    with contextlib.suppress(RayError, TimeoutError):
        await asyncio.wait_for(gone, CLOSE_TIMEOUT_S)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _reason(failure: RequestError) -> str:
    return f"{failure.kind}: {' '.join(failure.message.split())}"
