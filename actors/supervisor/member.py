"""`Member`: one replica of a pool, which is reserved, started, watched, ended, and started again after a death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from ...engine.errors import EngineDeadError
from ..config import PoolConfig
from ..replica.ranks import RankInfo
from ..replica.replica import EngineReplica, ReplicaSettings
from ..replica.worker import EngineWorker
from ..stats import ReplicaState, ReplicaStats
from .headroom import ranks_per_node
from .nodes import is_alive
from .placement import rank_options, release, reserve

logger = logging.getLogger(__name__)

MAX_CALLS = 100_000
"""Most open calls of an actor. A call is a coroutine that mostly waits, so a low limit would only block callers."""

CLOSE_TIMEOUT_S = 5.0
"""Seconds that a replica has to close its engine, or a killed process to disappear."""


@dataclass(slots=True, eq=False)
class Member:
    """A place of a pool, which has one replica at a time. A replica that replaces a dead one is the same member.

        starting -> ready -> dead -> starting ...        failed starts are repeated with back-off
        starting -> unplaced -> starting ...             the cluster has no room; the start is tried again
        starting -> failed                               the member is given up after too many failures in a row
        ready -> quarantine -> ready                     the replica runs only suspects, for one call at a time
        ready -> draining -> dead                        the replica finishes its requests, and is then ended

    Attributes:
        pool_name: Name of the pool.
        config: Settings of the pool.
        index: Number of the member in its pool.
        state: One of the states above.
        num_restarts: Number of times that the member went from dead to starting.
        is_leaving: Whether the member leaves the pool when its replica ends, which is then not restarted.
        up_order: Number of the replica in the order in which replicas of the pool came up; a larger number is later.
        actors: Actor of each rank, rank 0 first; empty until the actors are created. Clients call rank 0.
        infos: Process and node of each rank; empty unless the replica is up.
    """

    pool_name: str
    config: PoolConfig
    index: int
    state: ReplicaState = "starting"
    num_restarts: int = 0
    is_leaving: bool = False
    up_order: int = 0
    actors: list[Any] = field(default_factory=list)
    infos: list[RankInfo] = field(default_factory=list)
    _group: PlacementGroup | None = None

    @property
    def replica_id(self) -> str:
        """Id of the current replica, or of the next one while there is none: ``"INDEX.RESTART"``."""
        return f"{self.index}.{self.num_restarts}"

    @property
    def replica(self) -> Any:
        """Ray's handle of the actor of rank 0."""
        return self.actors[0]

    @property
    def is_up(self) -> bool:
        """Whether the replica has its model loaded and has not died."""
        return self.state in ("ready", "quarantine", "draining") and bool(self.actors)

    @property
    def node_ids(self) -> set[str]:
        """Ids of the Ray nodes that the ranks run on; empty unless the replica is up."""
        return {info.node_id for info in self.infos}

    def has_lost_a_node(self) -> bool:
        """Returns whether a node of the replica has left the cluster; if so, no request caused the replica's death."""
        return not all(is_alive(node_id) for node_id in self.node_ids)

    def stats(self) -> ReplicaStats:
        """Returns the replica's state, restarts, processes and nodes; metrics and engine statistics are left empty."""
        pids = tuple(info.pid for info in self.infos)
        nodes = tuple(info.node_id for info in self.infos)
        return ReplicaStats(self.replica_id, self.state, self.num_restarts, pids, nodes)

    async def start(self) -> None:
        """Reserves resources, starts the ranks and waits until the model is loaded.

        Raises:
            PlacementError: The cluster has no room for the replica.
            MillraceError: The model cannot be loaded, or a process ended. The resources are released.
        """
        name = f"{self.pool_name}/{self.replica_id}"
        self._group = await reserve(name, self.config.placement, self.config.placement_timeout_s)
        self.state = "starting"
        try:
            self.actors = self._create(self._group)
            self.infos = await self._load()
        except RayTaskError as exc:
            raise exc.cause from None
        except RayError as exc:
            raise EngineDeadError(f"its process ended while the model was loading: {one_line(exc)}") from None
        finally:
            if not self.infos:
                await self.end()

    async def until_death(self) -> str:
        """Waits until Ray reports a rank as dead or unreachable, and returns the message of Ray's error."""
        calls = [asyncio.ensure_future(_death(actor)) for actor in self.actors]
        try:
            done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for call in calls:
                call.cancel()

    async def close(self) -> None:
        """Asks the engine to close, waits at most `CLOSE_TIMEOUT_S` for it, and then calls `end`."""
        if self.is_up:
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(self.replica.close.remote(), CLOSE_TIMEOUT_S)
        await self.end()

    async def end(self) -> None:
        """Kills all ranks, waits until they are gone, and releases their resources."""
        actors, self.actors, self.infos = self.actors, [], []
        group, self._group = self._group, None
        try:
            await asyncio.gather(*(_kill(actor) for actor in actors))
        finally:
            if group is not None:
                release(group)

    def _create(self, group: PlacementGroup) -> list[Any]:
        config = self.config
        settings = ReplicaSettings(
            pool_name=self.pool_name,
            replica_id=self.replica_id,
            engine_kwargs=config.engine_kwargs,
            engine_factory=config.engine_factory,
            rank_main=config.rank_main,
            num_ranks=config.num_ranks,
            num_sharing=ranks_per_node(config),
            step_timeout_s=config.step_timeout_s,
        )
        replica: Any = ray.remote(EngineReplica)
        worker: Any = ray.remote(EngineWorker)
        options = [
            {"runtime_env": config.runtime_env, "max_concurrency": MAX_CALLS}
            | rank_options(group, config.placement, rank)
            for rank in range(config.num_ranks)
        ]
        workers = [worker.options(**options[rank]).remote(settings, rank) for rank in range(1, config.num_ranks)]
        return [replica.options(**options[0]).remote(settings), *workers]

    async def _load(self) -> list[RankInfo]:
        """Connects the ranks, waits until all have loaded, and returns where each runs; raises if one fails."""
        replica, *workers = self.actors
        ready = _begin(replica.ready)
        if not workers:
            return [await ready]
        address = _begin(replica.address)
        await asyncio.wait([ready, address], return_when=asyncio.FIRST_COMPLETED)
        runs = [_begin(worker.run, await address) for worker in workers] if address.done() else []
        await asyncio.wait([ready, *runs], return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            # A rank has ended. Rank 0 notices it too, and may know the reason better.
            await asyncio.wait([ready], timeout=CLOSE_TIMEOUT_S)
        for ended in [ready, *runs]:
            if ended.done() and (error := ended.exception()):
                raise error
        return [await ready, *await asyncio.gather(*(worker.where.remote() for worker in workers))]


def _begin(method: Any, *args: Any) -> asyncio.Task[Any]:
    """Calls a method of an actor in a task, which may fail without a warning that nobody has read its exception."""

    async def call() -> Any:
        return await method.remote(*args)

    task = asyncio.create_task(call())
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return task


async def _death(actor: Any) -> str:
    try:
        await actor.until_death.remote()
    except RayError as exc:
        return one_line(exc)
    raise AssertionError("until_death returned")


async def _kill(actor: Any) -> None:
    gone = actor.until_death.remote()
    ray.kill(actor)
    with contextlib.suppress(RayError, TimeoutError):
        await asyncio.wait_for(gone, CLOSE_TIMEOUT_S)


def one_line(error: BaseException) -> str:
    """Returns the message of an error without line breaks."""
    return " ".join(str(error).split())
