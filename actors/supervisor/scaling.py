"""How many replicas a pool should have: a rule on numbers, `Scaler`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Scaler:
    """Follows the work: more replicas at once, fewer only after a while.

    Args:
        places: Requests that keep a replica full.
        delay_s: Seconds that a replica must have been one too many.
        clock: Seconds that go on evenly.
    """

    def __init__(self, places: int, delay_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = places
        self._delay_s = delay_s
        self._clock = clock
        self._too_many_since_s: float | None = None

    def wanted(self, num_requests: int, num_now: int, low: int, high: int) -> int:
        """Returns how many replicas there should be.

        Args:
            num_requests: Requests on board of all replicas.
            num_now: Replicas there are, those that start among them.
            low: The fewest.
            high: The most.
        """
        wanted = max(low, min(high, math.ceil(num_requests / self._places)))
        if wanted >= num_now:
            self._too_many_since_s = None
            return wanted
        now_s = self._clock()
        if self._too_many_since_s is None:
            self._too_many_since_s = now_s
        return wanted if now_s - self._too_many_since_s >= self._delay_s else num_now
