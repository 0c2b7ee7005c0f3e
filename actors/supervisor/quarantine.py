"""A replica set apart for requests that were on board when another one died: `Quarantine`.

Who has such requests asks for a lease. One at a time holds it, in the order of asking, and has one replica for itself,
which first finishes what it has. So a request that is alone there when that replica dies is the one that killed it.
"""

from __future__ import annotations

import asyncio
import contextlib

from ray.exceptions import RayError

from ..replica.replica import Reference
from ..view import ReplicaHandle
from .roster import Roster
from .slot import Slot


class Quarantine:
    """The leases of one pool. Lives on the supervisor's event loop.

    Args:
        roster: The pool's slots.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._queue: dict[str, asyncio.Task[None]] = {}
        """Leases in the order of asking, each with the watch for its holder's death; the first is held."""

    async def lease(self, lease_id: str, presence: Reference) -> ReplicaHandle | None:
        """Waits for its turn and for a replica.

        Args:
            lease_id: Chosen by the caller, who must `end` it even if this never returns.
            presence: Never resolves, and is the caller's: its death ends the lease.

        Returns:
            A replica with nothing on board that takes nothing but calls in quarantine; None if the lease was ended
            meanwhile or the pool has no replica left.
        """
        self._queue[lease_id] = asyncio.create_task(self._end_with(presence, lease_id))
        while True:
            await self._roster.until(lambda: self._is_over(lease_id) or self._is_turn_of(lease_id))
            if self._is_over(lease_id):
                await self.end(lease_id)
                return None
            slot = self._choose()
            handle = self._roster.handle(slot)
            slot.state = "quarantine"
            await self._roster.tell()
            with contextlib.suppress(RayError):
                await handle.actor.drain.remote()
                if slot.state == "quarantine" and not self._is_over(lease_id):
                    return handle

    async def end(self, lease_id: str) -> None:
        """Gives the replica to the next in turn, or back to everyone. A lease that has ended stays so."""
        watch = self._queue.pop(lease_id, None)
        if watch is None:
            return
        if watch is not asyncio.current_task():
            watch.cancel()
        if not self._queue:
            for slot in self._slots():
                slot.state = "ready"
                with contextlib.suppress(RayError):
                    await slot.replica.resume.remote()
        await self._roster.tell()

    async def _end_with(self, presence: Reference, lease_id: str) -> None:
        with contextlib.suppress(RayError):
            await presence
        await self.end(lease_id)

    def _is_over(self, lease_id: str) -> bool:
        return lease_id not in self._queue or self._roster.is_over

    def _is_turn_of(self, lease_id: str) -> bool:
        return next(iter(self._queue)) == lease_id and bool(self._slots() or self._roster.ready())

    def _slots(self) -> list[Slot]:
        return [slot for slot in self._roster.slots if slot.state == "quarantine"]

    def _choose(self) -> Slot:
        """Takes the replica that came up last: after a death, that is one with little on board."""
        return max(self._slots() or self._roster.ready(), key=lambda slot: slot.up_order)
