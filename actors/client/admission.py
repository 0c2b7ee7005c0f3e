"""`Admission`: the limit on the requests that a client has in flight."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

LOTS = 8
"""Requests are admitted in lots of an eighth of the limit, apart from the last ones of a call. Each lot opens a stream,
which costs as much as several rows."""


@dataclass(slots=True, eq=False)
class _Waiter:
    wanted: int
    may_look: threading.Event = field(default_factory=threading.Event)


class Admission:
    """Admits requests up to a limit that all calls of a client share. Any thread may use it.

    Args:
        max_pending: Most requests in flight at once; None for no limit.
    """

    def __init__(self, max_pending: int | None = None) -> None:
        self._max_pending = max_pending
        self._num_pending = 0
        self._lock = threading.Lock()
        self._waiters: deque[_Waiter] = deque()

    def enter(self, wanted: int, *, wait: bool) -> int:
        """Admits some of the requests of a call.

        Args:
            wanted: Requests that the call has left.
            wait: Whether to wait for room. A call that already has requests in flight does not wait: it takes the room
                that they leave, so that calls end in the order in which they began.

        Returns:
            The number of requests admitted, to be given back with `leave`; 0 only if the call does not wait.
        """
        with self._lock:
            if not wait or not self._waiters:
                count = self._take(wanted)
                if count or not wait:
                    return count
            waiter = _Waiter(wanted)
            self._waiters.append(waiter)
        try:
            while True:
                waiter.may_look.wait()
                with self._lock:
                    waiter.may_look.clear()
                    if count := self._take(wanted):
                        return count
        finally:
            with self._lock:
                self._waiters.remove(waiter)
                self._call_first()

    def leave(self, count: int) -> None:
        """Gives the room of requests back.

        Args:
            count: Requests that have ended or were cancelled.
        """
        with self._lock:
            self._num_pending -= count
            self._call_first()

    def _take(self, wanted: int) -> int:
        count = self._room_for(wanted)
        self._num_pending += count
        return count

    def _call_first(self) -> None:
        if self._waiters and self._room_for(self._waiters[0].wanted):
            self._waiters[0].may_look.set()

    def _room_for(self, wanted: int) -> int:
        """Returns how many of the requests may be admitted: none until there is room for a lot."""
        if self._max_pending is None:
            return wanted
        free = self._max_pending - self._num_pending
        return min(wanted, free) if free >= min(wanted, max(1, self._max_pending // LOTS)) else 0
