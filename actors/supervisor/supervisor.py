"""The actor that owns a pool's replicas: starts them, hears of their deaths, starts them again, or gives up.

It takes no CPU and sees no row: clients ask it which replicas there are, and how one ended that is gone. It is owned by
the driver and owns the replicas; nothing is detached, so when a driver dies, however it dies, Ray ends them all.
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
from .nodes import draining_nodes
from .quarantine import Quarantine
from .roster import Roster
from .scaling import Scaler
from .slot import Slot, one_line

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 60.0
LOOK_ROUND_S = 0.5
"""Seconds between two looks at the nodes and at the work."""

NO_ROOM_RETRY_S = 30.0
"""Seconds before a cluster that had no room for a replica is asked again."""

LOSS_TIMEOUT_S = 60.0
"""Seconds in which the supervisor must have heard of a death that a client reports."""

LAST_SECONDS_S = 5.0
"""Of the time a node has left, what is kept for handing back."""


class Supervisor:
    """Keeps the replicas of one pool alive.

    Args:
        name: Name of the pool.
        config: Its settings.
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
        """Counts one more user, and begins to start replicas for the first.

        Args:
            config: Settings of the user; of several, the largest pool is kept.

        Returns:
            Whether the pool can be used; it cannot while it closes.
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
        """Counts one user less.

        Returns:
            Whether it was the last; nobody can join any more, and the caller must `close` the pool.
        """
        self._num_users -= 1
        self._is_closing = self._num_users <= 0
        return self._is_closing

    async def view(self, newer_than: int = -1) -> PoolView:
        """Waits for a change.

        Args:
            newer_than: A version the caller has seen; -1 returns at once.

        Returns:
            The pool as it is now, of a later version.
        """
        await self._roster.until(lambda: self._roster.version > newer_than)
        return self._roster.view()

    async def until_settled(self) -> PoolView:
        """Waits until each replica is up, given up or without room.

        Returns:
            The pool as it is then.
        """
        await self._roster.until(lambda: self._roster.is_settled)
        return self._roster.view()

    async def presence(self) -> None:
        """Never returns. Its result, which never comes, belongs to the caller: who waits for it hears of its death."""
        await asyncio.Event().wait()

    async def stats(self, with_engines: bool) -> PoolStats:
        """Describes the pool.

        Args:
            with_engines: Whether to ask each replica for its figures, which it reads between two steps.

        Returns:
            The pool and its replicas.
        """
        replicas = await asyncio.gather(*(_stats(slot, with_engines) for slot in self._roster.slots))
        failure = self._roster.failure
        return PoolStats(
            self._name, self._roster.state, _reason(failure) if failure else None, os.getpid(), list(replicas)
        )

    async def lease(self, lease_id: str, caller: Sequence[Reference]) -> ReplicaHandle | None:
        """Gives a replica to one client alone; see `Quarantine.lease`. The reference comes in a list."""
        return await self._quarantine.lease(lease_id, caller[0])

    async def end_lease(self, lease_id: str) -> None:
        """Takes it back, or the wish for it."""
        await self._quarantine.end(lease_id)

    async def report_loss(self, replica_id: str, num_finished: int) -> Loss:
        """Tells a client how a replica ended that it lost requests with.

        Args:
            replica_id: The replica, which does not answer.
            num_finished: Outputs that the client got from the pool since its last report.

        Returns:
            Whether a request may be to blame.
        """
        try:
            await asyncio.wait_for(self._roster.until(lambda: not self._is_up(replica_id)), LOSS_TIMEOUT_S)
        except TimeoutError:  # It is up, and out of reach of that client alone.
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
        """Ends all replicas and returns when they are gone and what they took is free."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._roster.is_closed = True
        await asyncio.gather(*(slot.close() for slot in self._roster.slots))
        await self._roster.tell()

    def _is_up(self, replica_id: str) -> bool:
        return any(slot.is_up and slot.replica_id == replica_id for slot in self._roster.slots)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("pool %s: %r", self._name, error, exc_info=error)

    async def _grow(self, size: int) -> None:
        taken = {slot.index for slot in self._roster.slots}
        free = (index for index in itertools.count() if index not in taken)
        for _ in range(size - sum(not slot.is_leaving for slot in self._roster.slots)):
            slot = Slot(self._name, self._config, next(free))
            self._roster.slots.append(slot)
            self._spawn(self._keep_alive(slot))
        await self._roster.tell()

    async def _keep_alive(self, slot: Slot) -> None:
        while await self._bring_up(slot):
            await self._bury(slot, await slot.until_death())
            if slot.is_leaving:
                break
            slot.num_restarts += 1
            slot.state = "starting"
        if slot.is_leaving:
            self._roster.slots.remove(slot)
        await self._roster.tell()

    async def _bring_up(self, slot: Slot) -> bool:
        """Starts the replica of a slot; returns whether it is up, for if not it never will be."""
        while True:
            try:
                await self._start(slot)
            except PlacementError as exc:
                await self._note_no_room(slot, exc)
                if slot.is_leaving:
                    return False
                await asyncio.sleep(NO_ROOM_RETRY_S)
            except Exception as exc:  # noqa: BLE001 - whatever keeps a replica from starting is the reason to give it up
                slot.state = "failed"
                self._roster.failure = RequestError.from_exception(exc)
                logger.error("replica %s does not start and is given up: %s", slot.replica_id, one_line(exc))
                await self._roster.tell()
                return False
            else:
                self._num_up += 1
                slot.state, slot.up_order = "ready", self._num_up
                await self._roster.tell()
                return True

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
                await slot.start()

    async def _note_no_room(self, slot: Slot, error: PlacementError) -> None:
        """Leaves a slot without room to be tried later; one more than the least is not worth the wait."""
        logger.warning("%s", error)
        slot.state = "unplaced"
        slot.is_leaving = slot.index >= self._low and len(self._roster.slots) > self._low
        self._no_room_until_s = asyncio.get_running_loop().time() + NO_ROOM_RETRY_S
        self._roster.failure = RequestError.from_exception(error)
        await self._roster.tell()

    async def _bury(self, slot: Slot, cause: str) -> None:
        if slot.state == "draining" or slot.has_lost_a_node():
            self._left.add(slot.replica_id)
            logger.info("replica %s left", slot.replica_id)
        else:
            logger.warning("replica %s died and starts again: %s", slot.replica_id, cause)
        slot.state = "dead"
        await self._roster.tell()
        await slot.end()

    async def _fail(self) -> None:
        """Gives all replicas up: the engine dies of whatever it is given."""
        for task in self._tasks:
            task.cancel()
        error = EngineDeadError(
            f"{len(self._barren)} replicas died one after the other and no request was finished between; the logs of "
            f"{', '.join(sorted(self._barren))} say why. If single requests are to blame, raise max_deaths_in_a_row"
        )
        self._roster.failure = RequestError.from_exception(error)
        for slot in self._roster.slots:
            slot.state = "failed"
        await self._roster.tell()
        await asyncio.gather(*(slot.end() for slot in self._roster.slots))

    async def _look_round(self) -> None:
        """Looks from time to time which nodes are about to go, and whether there are as many replicas as work."""
        while True:
            for node_id, left_s in draining_nodes().items():
                for slot in self._roster.slots:
                    if slot.state in ("ready", "quarantine") and node_id in slot.node_ids:
                        timeout_s = None if left_s is None else max(0.0, left_s - LAST_SECONDS_S)
                        await self._begin_to_drain(slot, timeout_s)
            if self._low < self._high:
                await self._follow_the_work()
            await asyncio.sleep(LOOK_ROUND_S)

    async def _follow_the_work(self) -> None:
        staying = [slot for slot in self._roster.slots if not slot.is_leaving]
        loads = await asyncio.gather(*(_load(slot) for slot in staying))
        wanted = self._scaler.wanted(sum(loads), len(staying), self._low, self._high)
        if wanted > len(staying) and asyncio.get_running_loop().time() >= self._no_room_until_s:
            await self._grow(wanted)
        elif wanted < len(staying) and len(ready := self._roster.ready()) > 1:
            slot = max(ready, key=lambda slot: slot.index)
            slot.is_leaving = True
            await self._begin_to_drain(slot, None)

    async def _begin_to_drain(self, slot: Slot, timeout_s: float | None) -> None:
        slot.state = "draining"
        logger.info("replica %s is drained", slot.replica_id)
        await self._roster.tell()
        self._spawn(_drain(slot, timeout_s))


async def _drain(slot: Slot, timeout_s: float | None) -> None:
    with contextlib.suppress(RayError):
        await slot.replica.drain.remote(timeout_s)
    if slot.state == "draining":  # Else it died meanwhile, and another replica may have its place.
        await slot.close()


async def _load(slot: Slot) -> int:
    try:
        return int(await slot.replica.load.remote()) if slot.is_up else 0
    except RayError:  # It died just now; its requests come back by themselves.
        return 0


async def _stats(slot: Slot, with_engine: bool) -> ReplicaStats:
    stats = slot.stats()
    if not with_engine or not slot.is_up:
        return stats
    try:
        engine, metrics = await slot.replica.stats.remote()
    except RayError:  # It died just now; the next call says so.
        return stats
    return dataclasses.replace(stats, engine=engine, metrics=metrics)


def _may_pass(error: BaseException) -> bool:
    """Returns whether another start may succeed; being cancelled is no failure, and a user's error stays."""
    return isinstance(error, Exception) and not isinstance(error, UserError | PlacementError)


def _reason(failure: RequestError) -> str:
    return f"{failure.kind}: {' '.join(failure.message.split())}"
