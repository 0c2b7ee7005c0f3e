"""`Roster`: the members of a pool, and the coroutines that wait for a change of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...engine.errors import RequestError
from ..stats import PoolState
from ..view import PoolView, ReplicaHandle
from .member import Member


class Roster:
    """The members of one pool, and the number of their changes. It may be used only on the supervisor's event loop.

    Args:
        max_attempts: As in `PoolConfig`; the views carry it to the clients.

    Attributes:
        members: All members of the pool, whether their replicas are up or not.
        failure: The latest reason why a replica was given up or has no room; None if there is none.
        is_closed: Whether the pool is closed, so that no replica will be up again.
    """

    def __init__(self, max_attempts: int) -> None:
        self.members: list[Member] = []
        self.failure: RequestError | None = None
        self.is_closed = False
        self._max_attempts = max_attempts
        self._version = 0
        self._changed = asyncio.Condition()

    @property
    def version(self) -> int:
        """Number of changes of the pool so far, counted by `tell`."""
        return self._version

    @property
    def state(self) -> PoolState:
        """The state of the pool as a whole, as in `PoolStats`."""
        if self.is_closed:
            return "closed"
        if any(member.is_up for member in self.members):
            return "ready"
        return "failed" if all(member.state in ("failed", "unplaced") for member in self.members) else "starting"

    @property
    def is_settled(self) -> bool:
        """Whether each replica is up, given up or without room, or the pool is closed."""
        return self.is_closed or all(member.is_up or member.state in ("failed", "unplaced") for member in self.members)

    @property
    def is_over(self) -> bool:
        """Whether no replica is up and none is expected."""
        return self.state in ("failed", "closed")

    def ready(self) -> list[Member]:
        """Returns the members whose replicas take requests of all clients: up, not draining and not in quarantine."""
        return [member for member in self.members if member.state == "ready" and member.is_up]

    def view(self) -> PoolView:
        """Returns the present view of the pool, which the supervisor sends to clients."""
        replicas = tuple(self.handle(member) for member in self.ready())
        return PoolView(self._version, self.state, self.failure, self._max_attempts, replicas)

    def handle(self, member: Member) -> ReplicaHandle:
        """Returns the handle with which clients call a replica."""
        return ReplicaHandle(member.replica_id, member.replica, self._version)

    async def tell(self) -> None:
        """Counts a change of the pool, and wakes every coroutine that waits in `until`. Must follow each change."""
        async with self._changed:
            self._version += 1
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds. The condition is evaluated now and after each change."""
        async with self._changed:
            await self._changed.wait_for(condition)
