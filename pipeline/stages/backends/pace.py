"""`Throttle` limits the requests per second, and `RetryRule` decides the waits before retries."""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


class Throttle:
    """A limit on the requests per second. A request awaits a call of the object, which spaces requests evenly.

    Args:
        qps: Most requests per second; None for no limit.
    """

    def __init__(self, qps: float | None) -> None:
        self._gap_s = 1.0 / qps if qps else 0.0
        self._next_s = 0.0

    async def __call__(self) -> None:
        """Waits until the caller may send its request."""
        now_s = asyncio.get_running_loop().time()
        turn_s = self.take_turn(now_s)
        if turn_s > now_s:
            await asyncio.sleep(turn_s - now_s)

    def take_turn(self, now_s: float) -> float:
        """Reserves the next time at which a request may be sent, and returns it on the clock of `now_s`.

        Args:
            now_s: Time now in seconds, on any clock.
        """
        turn_s = max(now_s, self._next_s)
        self._next_s = turn_s + self._gap_s
        return turn_s


@dataclass(frozen=True)
class RetryRule:
    """The number of retries of a request, and the waits before them.

    Attributes:
        max_retries: Most times that a request is sent again.
        base_wait_s: Most seconds before the first retry. The limit doubles with each retry, and the wait is drawn
            evenly below the limit ("full jitter"), so that rows that failed together are not retried together.
        max_wait_s: Largest value of the limit on the wait. The wait is not shorter than the server asks for in
            `Retry-After`, but no longer than this either.
    """

    max_retries: int = 0
    base_wait_s: float = 1.0
    max_wait_s: float = 60.0

    def wait_s(self, attempt: int, retry_after: str | None = None) -> float:
        """Returns the seconds to wait after an attempt.

        Args:
            attempt: Number of the attempt, from 1.
            retry_after: Header `Retry-After` of the server's answer; None if there is none.
        """
        # The exponent is limited, so that a large number of attempts does not overflow a float.
        bound = min(self.max_wait_s, self.base_wait_s * 2.0 ** min(attempt - 1, 64))
        return max(min(self.max_wait_s, retry_after_s(retry_after)), random.uniform(0.0, bound))


def retry_after_s(value: str | None) -> float:
    """Returns the seconds that a `Retry-After` header asks for: a number, or a date.

    Args:
        value: Value of the header. None and malformed text give 0.
    """
    if value is None:
        return 0.0
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value.strip()):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
