"""`Scaler`: the rule that says how many replicas a pool should have."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Scaler:
    """Computes the number of replicas for a number of requests. It rises at once, and falls only after a delay.

    Args:
        places: Number of requests at which a replica is full.
        delay_s: Seconds for which there must have been too many replicas before the number falls.
        clock: Function that returns the seconds of a steady clock.
    """

    def __init__(self, places: int, delay_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = places
        self._delay_s = delay_s
        self._clock = clock
        self._too_many_since_s: float | None = None

    def wanted(self, num_requests: int, num_now: int, low: int, high: int) -> int:
        """Returns how many replicas the pool should have: enough for all requests, between `low` and `high`.

        Args:
            num_requests: Number of requests on board of all replicas together.
            num_now: Number of replicas that the pool has now, leaving replicas not counted.
            low: Fewest replicas.
            high: Most replicas.
        """
        wanted = max(low, min(high, math.ceil(num_requests / self._places)))
        if wanted >= num_now:
            self._too_many_since_s = None
            return wanted
        now_s = self._clock()
        if self._too_many_since_s is None:
            self._too_many_since_s = now_s
        return wanted if now_s - self._too_many_since_s >= self._delay_s else num_now
