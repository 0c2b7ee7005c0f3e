"""`Quarantine`: a replica that runs only requests which were on board when another replica died.

A client with such requests asks for a lease. One client at a time holds the lease, in the order of asking, and has one
replica to itself, which first finishes the requests that it has. A request that is alone on that replica when it dies
is therefore the request that killed it.
"""

from __future__ import annotations

import asyncio
import contextlib

from ray.exceptions import RayError

from ..replica.replica import Reference
from ..view import ReplicaHandle
from .member import Member
from .roster import Roster


class Quarantine:
    """The queue of the leases of one pool. It may be used only on the supervisor's event loop.

    Args:
        roster: Members of the pool.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._queue: dict[str, asyncio.Task[None]] = {}
        """Leases in the order of asking, each with a task that ends it when its client dies. The first is held."""

    async def lease(self, lease_id: str, presence: Reference) -> ReplicaHandle | None:
        """Queues a lease, and waits until it is the first of the queue and a replica has finished its other requests.

        Args:
            lease_id: An id that the caller has chosen. The caller must `end` it even if this call never returns.
            presence: Reference that the caller owns and that never resolves; the lease ends when the caller dies.

        Returns:
            A replica with no request on board that takes only calls in quarantine; None if the lease was ended in the
            meantime or the pool has no replica left.
        """
        self._queue[lease_id] = asyncio.create_task(self._end_with(presence, lease_id))
        while True:
            await self._roster.until(lambda: self._is_over(lease_id) or self._is_turn_of(lease_id))
            if self._is_over(lease_id):
                await self.end(lease_id)
                return None
            member = self._choose()
            handle = self._roster.handle(member)
            member.state = "quarantine"
            await self._roster.tell()
            with contextlib.suppress(RayError):
                await handle.actor.drain.remote()
                if member.state == "quarantine" and not self._is_over(lease_id):
                    return handle

    async def end(self, lease_id: str) -> None:
        """Ends a lease: its replica goes to the next lease or serves all clients again. A second call does nothing."""
        watch = self._queue.pop(lease_id, None)
        if watch is None:
            return
        if watch is not asyncio.current_task():
            watch.cancel()
        if not self._queue:
            for member in self._members():
                member.state = "ready"
                with contextlib.suppress(RayError):
                    await member.replica.resume.remote()
        await self._roster.tell()

    async def _end_with(self, presence: Reference, lease_id: str) -> None:
        with contextlib.suppress(RayError):
            await presence
        await self.end(lease_id)

    def _is_over(self, lease_id: str) -> bool:
        return lease_id not in self._queue or self._roster.is_over

    def _is_turn_of(self, lease_id: str) -> bool:
        return next(iter(self._queue)) == lease_id and bool(self._members() or self._roster.ready())

    def _members(self) -> list[Member]:
        return [member for member in self._roster.members if member.state == "quarantine"]

    def _choose(self) -> Member:
        """Returns the member in quarantine, else the ready member that came up last and so has little on board."""
        return max(self._members() or self._roster.ready(), key=lambda member: member.up_order)
