"""Who is in a pool: its slots, and everyone who waits for a change among them: `Roster`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...engine.errors import RequestError
from ..stats import PoolState
from ..view import PoolView, ReplicaHandle
from .slot import Slot


class Roster:
    """The slots of one pool. Lives on the supervisor's event loop, which alone touches it.

    Args:
        max_attempts: As in `PoolConfig`; clients are told.

    Attributes:
        slots: The places of the pool.
        failure: Why a replica was given up or has no room, lastly; None if none was.
        is_closed: Whether nothing will ever be up again.
    """

    def __init__(self, max_attempts: int) -> None:
        self.slots: list[Slot] = []
        self.failure: RequestError | None = None
        self.is_closed = False
        self._max_attempts = max_attempts
        self._version = 0
        self._changed = asyncio.Condition()

    @property
    def version(self) -> int:
        """Counts the changes."""
        return self._version

    @property
    def state(self) -> PoolState:
        """The state of the pool as a whole."""
        if self.is_closed:
            return "closed"
        if any(slot.is_up for slot in self.slots):
            return "ready"
        return "failed" if all(slot.state in ("failed", "unplaced") for slot in self.slots) else "starting"

    @property
    def is_settled(self) -> bool:
        """Whether each slot is up, given up or without room."""
        return self.is_closed or all(slot.is_up or slot.state in ("failed", "unplaced") for slot in self.slots)

    @property
    def is_over(self) -> bool:
        """Whether no replica is up and none will be, as far as is known."""
        return self.state in ("failed", "closed")

    def ready(self) -> list[Slot]:
        """Returns the slots whose replicas take requests."""
        return [slot for slot in self.slots if slot.state == "ready" and slot.is_up]

    def view(self) -> PoolView:
        """Returns what a client needs to know."""
        replicas = tuple(self.handle(slot) for slot in self.ready())
        return PoolView(self._version, self.state, self.failure, self._max_attempts, replicas)

    def handle(self, slot: Slot) -> ReplicaHandle:
        """Returns what clients call the replica of a slot with."""
        return ReplicaHandle(slot.replica_id, slot.replica, self._version)

    async def tell(self) -> None:
        """Wakes all who wait for a change."""
        async with self._changed:
            self._version += 1
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds; it is looked at after each change."""
        async with self._changed:
            await self._changed.wait_for(condition)
