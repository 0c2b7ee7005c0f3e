"""`Supervisor`: the actor that owns the replicas of a pool and restarts those that die.

It gives the pool up after too many deaths in a row. It takes no CPU, and no row passes through it: clients ask which
replicas there are and how a lost replica ended. The driver owns the supervisor, and the supervisor owns the replicas.
No actor is detached, so Ray ends all of them when the driver dies in any way.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Coroutine, Sequence
from typing import Any

from ray.exceptions import RayError
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential

from ...engine.errors import EngineDeadError, PlacementError, RequestError, UserError
from ..config import PoolConfig
from ..replica.replica import Reference
from ..stats import PoolStats, ReplicaStats
from ..view import Loss, PoolView, ReplicaHandle
from .member import Member, one_line
from .nodes import draining_nodes
from .quarantine import Quarantine
from .roster import Roster
from .scaling import Scaler

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 60.0
LOOK_ROUND_S = 0.5
"""Seconds between two checks of the nodes and of the number of requests."""

NO_ROOM_RETRY_S = 30.0
"""Seconds after which a replica that had no room is tried again."""

LOSS_TIMEOUT_S = 60.0
"""Seconds that the supervisor waits to notice a death which a client has reported."""

LAST_SECONDS_S = 5.0
"""Seconds before a node leaves in which its replicas hand their unfinished requests back."""


class Supervisor:
    """Ray actor that keeps the replicas of one pool alive, and tells clients which replicas there are.

    Args:
        name: Name of the pool.
        config: Settings of the pool.
    """

    def __init__(self, name: str, config: PoolConfig) -> None:
        self._name = name
        self._config = config
        self._low, self._high = config.min_replicas, config.max_replicas
        self._roster = Roster(config.max_attempts)
        self._quarantine = Quarantine(self._roster)
        self._scaler = Scaler(config.places, config.scale_down_delay_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_users = 0
        self._is_closing = False
        self._num_up = 0
        self._left: set[str] = set()
        self._barren: set[str] = set()
        self._no_room_until_s = 0.0

    def __repr__(self) -> str:
        return f"EnginePool({self._name})"

    async def join(self, config: PoolConfig) -> bool:
        """Adds a user of the pool, and starts replicas if the pool has fewer than the user's minimum.

        Args:
            config: Settings of the user; the pool keeps the largest number of replicas of all its users.

        Returns:
            Whether the user was added; False if the pool is closing.
        """
        if self._is_closing:
            return False
        self._num_users += 1
        self._low, self._high = max(self._low, config.min_replicas), max(self._high, config.max_replicas)
        if self._num_users == 1:
            self._spawn(self._look_round())
        await self._grow(self._low)
        return True

    async def leave(self) -> bool:
        """Removes a user of the pool.

        Returns:
            Whether it was the last user. Then nobody can join any more, and the caller must `close` the pool.
        """
        self._num_users -= 1
        self._is_closing = self._num_users <= 0
        return self._is_closing

    async def view(self, newer_than: int = -1) -> PoolView:
        """Waits until the pool has changed since the version that the caller has seen, and returns the new view.

        Args:
            newer_than: The latest version that the caller has seen; -1 returns at once.

        Returns:
            The present view, whose version is larger than `newer_than`.
        """
        await self._roster.until(lambda: self._roster.version > newer_than)
        return self._roster.view()

    async def until_settled(self) -> PoolView:
        """Waits until each replica is up, given up or without room.

        Returns:
            The view of the pool at that time.
        """
        await self._roster.until(lambda: self._roster.is_settled)
        return self._roster.view()

    async def presence(self) -> None:
        """Never returns. The caller owns the reference to the result; awaiting it fails when the caller dies."""
        await asyncio.Event().wait()

    async def stats(self, with_engines: bool) -> PoolStats:
        """Returns the present state of the pool and its replicas.

        Args:
            with_engines: Whether to ask each replica that is up for its metrics and its engine's statistics.

        Returns:
            The pool and its replicas.
        """
        replicas = await asyncio.gather(*(_stats(member, with_engines) for member in self._roster.members))
        failure = self._roster.failure
        return PoolStats(
            self._name, self._roster.state, _reason(failure) if failure else None, os.getpid(), list(replicas)
        )

    async def lease(self, lease_id: str, caller: Sequence[Reference]) -> ReplicaHandle | None:
        """Leases a replica, see `Quarantine.lease`. `caller` is `[presence]`, as Ray awaits a bare reference."""
        return await self._quarantine.lease(lease_id, caller[0])

    async def end_lease(self, lease_id: str) -> None:
        """Ends a lease, whether it was granted or still waits."""
        await self._quarantine.end(lease_id)

    async def report_loss(self, replica_id: str, num_finished: int) -> Loss:
        """Waits until a replica that a client has lost is no longer up, and returns how it ended.

        After `max_deaths_in_a_row` deaths without a finished request in between, the whole pool is given up.

        Args:
            replica_id: The replica that does not answer.
            num_finished: Outputs that the client received from the pool since its last report.

        Returns:
            ``"died"`` if a request may be to blame; ``"left"`` if not, also if the replica is still up after
            `LOSS_TIMEOUT_S`.
        """
        try:
            await asyncio.wait_for(self._roster.until(lambda: not self._is_up(replica_id)), LOSS_TIMEOUT_S)
        except TimeoutError:  # It is up; only that client cannot reach it.
            return "left"
        loss: Loss = "left" if replica_id in self._left else "died"
        if num_finished:
            self._barren.clear()
        if loss == "died":
            self._barren.add(replica_id)
        if len(self._barren) >= self._config.max_deaths_in_a_row:
            await self._fail()
        return loss

    async def close(self) -> None:
        """Closes the pool: ends all replicas, and returns when they are gone and their resources are free."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._roster.is_closed = True
        await asyncio.gather(*(member.close() for member in self._roster.members))
        await self._roster.tell()

    def _is_up(self, replica_id: str) -> bool:
        return any(member.is_up and member.replica_id == replica_id for member in self._roster.members)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("pool %s: %r", self._name, error, exc_info=error)

    async def _grow(self, size: int) -> None:
        taken = {member.index for member in self._roster.members}
        free = (index for index in itertools.count() if index not in taken)
        for _ in range(size - sum(not member.is_leaving for member in self._roster.members)):
            member = Member(self._name, self._config, next(free))
            self._roster.members.append(member)
            self._spawn(self._keep_alive(member))
        await self._roster.tell()

    async def _keep_alive(self, member: Member) -> None:
        while await self._bring_up(member):
            await self._bury(member, await member.until_death())
            if member.is_leaving:
                break
            member.num_restarts += 1
            member.state = "starting"
        if member.is_leaving:
            self._roster.members.remove(member)
        await self._roster.tell()

    async def _bring_up(self, member: Member) -> bool:
        """Starts the replica of a member, and returns whether it is up.

        If the cluster has no room, it tries again until there is room or the member leaves the pool. After any other
        failure, which `_start` has tried to overcome, the member gets the state `failed`.
        """
        while True:
            try:
                await self._start(member)
            except PlacementError as exc:
                await self._note_no_room(member, exc)
                if member.is_leaving:
                    return False
                await asyncio.sleep(NO_ROOM_RETRY_S)
            except Exception as exc:  # noqa: BLE001 - any error that keeps a replica from starting is final
                member.state = "failed"
                self._roster.failure = RequestError.from_exception(exc)
                logger.error("replica %s does not start and is given up: %s", member.replica_id, one_line(exc))
                await self._roster.tell()
                return False
            else:
                self._num_up += 1
                member.state, member.up_order = "ready", self._num_up
                await self._roster.tell()
                return True

    async def _start(self, member: Member) -> None:
        """Starts the replica of a member, and tries again after a failure with exponential back-off.

        Raises:
            Exception: The last of too many failures, or the first failure that another start would only repeat.
        """
        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(self._config.max_start_failures),
            wait=wait_exponential(multiplier=self._config.start_backoff_s, max=MAX_BACKOFF_S),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        ):
            with attempt:
                await member.start()

    async def _note_no_room(self, member: Member, error: PlacementError) -> None:
        """Marks a member as unplaced, to be tried later; a member beyond the minimum is marked as leaving too."""
        logger.warning("%s", error)
        member.state = "unplaced"
        member.is_leaving = member.index >= self._low and len(self._roster.members) > self._low
        self._no_room_until_s = asyncio.get_running_loop().time() + NO_ROOM_RETRY_S
        self._roster.failure = RequestError.from_exception(error)
        await self._roster.tell()

    async def _bury(self, member: Member, cause: str) -> None:
        if member.state == "draining" or member.has_lost_a_node():
            self._left.add(member.replica_id)
            logger.info("replica %s left", member.replica_id)
        else:
            logger.warning("replica %s died and starts again: %s", member.replica_id, cause)
        member.state = "dead"
        await self._roster.tell()
        await member.end()

    async def _fail(self) -> None:
        """Gives the pool up: ends all replicas and marks them as failed, because too many have died in a row."""
        for task in self._tasks:
            task.cancel()
        error = EngineDeadError(
            f"{len(self._barren)} replicas died one after the other and no request was finished between; the logs of "
            f"{', '.join(sorted(self._barren))} say why. If single requests are to blame, raise max_deaths_in_a_row"
        )
        self._roster.failure = RequestError.from_exception(error)
        for member in self._roster.members:
            member.state = "failed"
        await self._roster.tell()
        await asyncio.gather(*(member.end() for member in self._roster.members))

    async def _look_round(self) -> None:
        """Every `LOOK_ROUND_S`, drains replicas on leaving nodes, and fits the pool's size to the requests."""
        while True:
            for node_id, left_s in draining_nodes().items():
                for member in self._roster.members:
                    if member.state in ("ready", "quarantine") and node_id in member.node_ids:
                        timeout_s = None if left_s is None else max(0.0, left_s - LAST_SECONDS_S)
                        await self._begin_to_drain(member, timeout_s)
            if self._low < self._high:
                await self._follow_the_work()
            await asyncio.sleep(LOOK_ROUND_S)

    async def _follow_the_work(self) -> None:
        staying = [member for member in self._roster.members if not member.is_leaving]
        loads = await asyncio.gather(*(_load(member) for member in staying))
        wanted = self._scaler.wanted(sum(loads), len(staying), self._low, self._high)
        if wanted > len(staying) and asyncio.get_running_loop().time() >= self._no_room_until_s:
            await self._grow(wanted)
        elif wanted < len(staying) and len(ready := self._roster.ready()) > 1:
            member = max(ready, key=lambda member: member.index)
            member.is_leaving = True
            await self._begin_to_drain(member, None)

    async def _begin_to_drain(self, member: Member, timeout_s: float | None) -> None:
        member.state = "draining"
        logger.info("replica %s is drained", member.replica_id)
        await self._roster.tell()
        self._spawn(_drain(member, timeout_s))


async def _drain(member: Member, timeout_s: float | None) -> None:
    with contextlib.suppress(RayError):
        await member.replica.drain.remote(timeout_s)
    if member.state == "draining":  # Otherwise it died in the meantime, and another replica may have taken its place.
        await member.close()


async def _load(member: Member) -> int:
    try:
        return int(await member.replica.load.remote()) if member.is_up else 0
    except RayError:  # It died just now; its clients notice that and send its requests elsewhere.
        return 0


async def _stats(member: Member, with_engine: bool) -> ReplicaStats:
    stats = member.stats()
    if not with_engine or not member.is_up:
        return stats
    try:
        engine, metrics = await member.replica.stats.remote()
    except RayError:  # It died just now; the next call notices it.
        return stats
    return dataclasses.replace(stats, engine=engine, metrics=metrics)


def _may_pass(error: BaseException) -> bool:
    """Returns whether `_start` repeats a failed start: not after a cancellation, a `UserError` or a lack of room."""
    return isinstance(error, Exception) and not isinstance(error, UserError | PlacementError)


def _reason(failure: RequestError) -> str:
    return f"{failure.kind}: {' '.join(failure.message.split())}"
