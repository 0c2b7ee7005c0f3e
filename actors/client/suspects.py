"""`Suspects`: the requests that were on board when a replica died, and the search for the one that killed it.

Suspects run one at a time, so the second death names the guilty request: the one that was alone. If very many requests
were on board, they first run in groups, about as many groups as each has members, because a death that no request
caused would otherwise occupy a replica for long. The requests of a group that dies then run one at a time.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence

from ...engine.request import Request

MAX_ALONE = 128
"""Most suspects of one death that run one at a time: a call of the pipeline has that many rows by default."""


class Suspects:
    """Queue of the suspects of one call, in groups that run one after another, with the deaths of each.

    Args:
        max_attempts: Number of replicas that must die with a request on board before it can be found guilty.
    """

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._num_deaths: Counter[str] = Counter()
        self._groups: deque[list[Request]] = deque()

    def __bool__(self) -> bool:
        return bool(self._groups)

    def num_deaths(self, request_id: str) -> int:
        """Returns how many replicas died with a request on board."""
        return self._num_deaths[request_id]

    def note_death(self, on_board: Sequence[Request], is_apart: bool) -> Request | None:
        """Counts a death for each request that was on board, and queues the requests in groups to run again.

        Args:
            on_board: Requests of this call that were on board.
            is_apart: Whether no requests of other calls were on board.

        Returns:
            The guilty request if it was alone on board and has reached `max_attempts`, and then nothing is queued; else
            None.
        """
        self._num_deaths.update(request.request_id for request in on_board)
        if is_apart and len(on_board) == 1 and self._num_deaths[on_board[0].request_id] >= self._max_attempts:
            return on_board[0]
        size = 1 if len(on_board) <= MAX_ALONE else math.isqrt(len(on_board))
        groups = [list(on_board[start : start + size]) for start in range(0, len(on_board), size)]
        self._groups.extendleft(reversed(groups))  # The guilty request is in this group; smaller groups run first.
        return None

    def put_back(self, group: list[Request]) -> None:
        """Puts a group whose run ended without a death of a replica back to the front of the queue."""
        self._groups.appendleft(group)

    def next_group(self) -> list[Request]:
        """Removes the first group from the queue and returns its requests, which run next, apart from all others."""
        return self._groups.popleft()
