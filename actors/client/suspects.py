"""Requests that were on board at a death, and how the one that killed is told from the others: `Suspects`.

They are run one at a time, so that the guilty one is known by the second death. Only where a call had very many on
board are they run in groups first, as many as a group has members: a death which no request caused would else hold up a
replica for long. The group that dies is run one at a time. A request is guilty that died alone.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence

from ...engine.request import Request

MAX_ALONE = 128
"""Suspects of one death that are run one at a time: as many as a call of the pipeline has rows by default."""


class Suspects:
    """The suspects of one call.

    Args:
        max_attempts: Deaths before a request can be found guilty.
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
        """Takes in what was on board when a replica died.

        Args:
            on_board: The requests of this call.
            is_apart: Whether there were no others.

        Returns:
            The request that is guilty, if it is known by this; all others will have to be run again.
        """
        self._num_deaths.update(request.request_id for request in on_board)
        if is_apart and len(on_board) == 1 and self._num_deaths[on_board[0].request_id] >= self._max_attempts:
            return on_board[0]
        size = 1 if len(on_board) <= MAX_ALONE else math.isqrt(len(on_board))
        groups = [list(on_board[start : start + size]) for start in range(0, len(on_board), size)]
        self._groups.extendleft(reversed(groups))  # The guilty one is among them: the fewer first.
        return None

    def put_back(self, group: list[Request]) -> None:
        """Takes back a group that was not run to its end, though nothing died of it."""
        self._groups.appendleft(group)

    def next_group(self) -> list[Request]:
        """Returns those that are to be run next, apart from everything else."""
        return self._groups.popleft()
