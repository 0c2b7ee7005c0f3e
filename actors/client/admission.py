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
    """Limits the requests that all calls of a client have in flight together. Thread-safe.

    Args:
        max_pending: Most requests in flight at once; None for no limit.
    """

    def __init__(self, max_pending: int | None = None) -> None:
        self._max_pending = max_pending
        self._num_pending = 0
        self._lock = threading.Lock()
        self._waiters: deque[_Waiter] = deque()

    def enter(self, wanted: int, *, wait: bool) -> int:
        """Admits some requests of a call, as many as the limit allows, and counts them as in flight.

        Args:
            wanted: Number of requests of the call that are not admitted yet.
            wait: Whether to wait until at least one request is admitted. Waiting calls are served in order of arrival.
                A call with requests in flight passes False, and may then overtake waiting calls, so that calls end in
                the order in which they began.

        Returns:
            The number of requests admitted, at least 1 if `wait` is True. The caller must pass the number to `leave`
            when the requests have ended.
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
        """Subtracts requests from the requests in flight, so that others can be admitted.

        Args:
            count: Number of requests that have ended or were cancelled.
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
        """Returns how many of `wanted` requests fit under the limit; 0 while fewer than a lot (`LOTS`) would fit."""
        if self._max_pending is None:
            return wanted
        free = self._max_pending - self._num_pending
        return min(wanted, free) if free >= min(wanted, max(1, self._max_pending // LOTS)) else 0
