"""One place of a pool and the replica in it: `Slot`, which reserves, starts, watches and ends."""

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
"""Open calls an actor takes. They are coroutines that wait: a limit that is reached would only block someone."""

CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True, eq=False)
class Slot:
    """A place for one replica at a time.

        starting -> ready -> dead -> starting ...        each start with back-off between its failures
        starting -> unplaced -> starting ...             the cluster has no room; it is asked again
        starting -> failed                               for good, after too many failures in a row
        ready -> quarantine -> ready                     kept for requests that were there at a death
        ready -> draining -> dead                        asked to leave; what it has on board ends first

    Attributes:
        pool_name: The pool.
        config: Its settings.
        index: Which of the pool's places.
        state: Where in the drawing above.
        num_restarts: Times it went from dead to starting.
        is_leaving: Whether nothing shall follow the replica that is here.
        up_order: When the replica came up: larger is later.
        actors: The ranks of the replica, once they were created; rank 0 is the one to call.
        infos: Where each runs; empty unless the replica is up.
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
        """Name of the replica that is or will be here."""
        return f"{self.index}.{self.num_restarts}"

    @property
    def replica(self) -> Any:
        """Ray's handle of rank 0."""
        return self.actors[0]

    @property
    def is_up(self) -> bool:
        """Whether the replica has its model loaded and has not died."""
        return self.state in ("ready", "quarantine", "draining") and bool(self.actors)

    @property
    def node_ids(self) -> set[str]:
        """The nodes of the replica that is up."""
        return {info.node_id for info in self.infos}

    def has_lost_a_node(self) -> bool:
        """Returns whether a node of the replica is gone, so that its death is the node's."""
        return not all(is_alive(node_id) for node_id in self.node_ids)

    def stats(self) -> ReplicaStats:
        """Returns what there is to tell without asking the engine."""
        pids = tuple(info.pid for info in self.infos)
        nodes = tuple(info.node_id for info in self.infos)
        return ReplicaStats(self.replica_id, self.state, self.num_restarts, pids, nodes)

    async def start(self) -> None:
        """Reserves what the replica takes, starts its ranks and waits until the model is loaded.

        Raises:
            PlacementError: There is no room.
            MillraceError: The model does not load, and why.
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
        """Waits until a rank is dead, or out of reach, and says why."""
        calls = [asyncio.ensure_future(_death(actor)) for actor in self.actors]
        try:
            done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for call in calls:
                call.cancel()

    async def close(self) -> None:
        """Closes the engine if it answers in time, and ends the replica."""
        if self.is_up:
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(self.replica.close.remote(), CLOSE_TIMEOUT_S)
        await self.end()

    async def end(self) -> None:
        """Kills all ranks, waits until they are gone, and gives back what they took."""
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
        """Brings the ranks together and waits until all have loaded their part, or one has failed."""
        replica, *workers = self.actors
        ready = _begin(replica.ready)
        if not workers:
            return [await ready]
        address = _begin(replica.address)
        await asyncio.wait([ready, address], return_when=asyncio.FIRST_COMPLETED)
        runs = [_begin(worker.run, await address) for worker in workers] if address.done() else []
        await asyncio.wait([ready, *runs], return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            # A rank has ended. Rank 0 hears of it too, and may know more of the reason.
            await asyncio.wait([ready], timeout=CLOSE_TIMEOUT_S)
        for ended in [ready, *runs]:
            if ended.done() and (error := ended.exception()):
                raise error
        return [await ready, *await asyncio.gather(*(worker.where.remote() for worker in workers))]


def _begin(method: Any, *args: Any) -> asyncio.Task[Any]:
    """Calls an actor. The call may outlast the interest in it: it ends with the actor at the latest."""

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
    """Writes an error without line breaks."""
    return " ".join(str(error).split())
