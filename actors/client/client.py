"""`PoolClient`, with which a worker that has rows sends them to the replicas of a pool as requests."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from ...engine.errors import UserError
from ...engine.request import EngineOutput, Request
from .admission import Admission
from .call import Call
from .connection import PoolConnection

ADMISSION_INTERVAL_S = 0.05
"""Seconds after which a call that waits for outputs checks whether another call has made room for more requests."""


class PoolClient:
    """Runs requests on the replicas of a pool. Thread-safe; a process needs only one client of a pool.

    Args:
        pool_name: Name of an `EnginePool` of this cluster.
        max_pending: Most requests in flight at once, counted over all calls; None for no limit.

    Raises:
        EngineDeadError: There is no such pool.
    """

    def __init__(self, pool_name: str, max_pending: int | None = None) -> None:
        self._connection = PoolConnection(pool_name)
        self._admission = Admission(max_pending)

    def generate(self, requests: Sequence[Request]) -> Iterator[EngineOutput]:
        """Runs requests and yields the output of each exactly once, as soon as it finishes.

        Requests beyond `max_pending` wait in this process until others have finished. When a replica leaves, its
        unfinished requests go to another replica, and wait if none is up. When a replica dies, its requests run again
        apart from all others, so that the request that kills replicas is found. Closing the generator early cancels
        the unfinished requests.

        Args:
            requests: Requests with different ids.

        Yields:
            Outputs in the order in which they finish. A request that fails has `error` set; the kind is
            ``"ReplicaDiedError"`` if replicas die of it.

        Raises:
            UserError: Two requests have the same id.
            EngineDeadError: The pool gave up all replicas, or is closed.
        """
        if len({request.request_id for request in requests}) < len(requests):
            twice = [name for name, count in Counter(r.request_id for r in requests).items() if count > 1]
            raise UserError(f"request ids must differ within a call; given twice or more: {', '.join(twice)}")
        call, waiting, num_in = Call(self._connection), deque(requests), 0
        try:
            while waiting or call.is_open:
                if waiting and (count := self._admission.enter(len(waiting), wait=not call.is_open)):
                    num_in += count
                    call.submit([waiting.popleft() for _ in range(count)])
                for output in call.next_outputs(ADMISSION_INTERVAL_S if waiting else None):
                    num_in -= 1
                    self._admission.leave(1)
                    yield output
        finally:
            call.cancel()
            self._admission.leave(num_in)
