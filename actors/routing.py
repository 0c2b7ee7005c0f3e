"""Which replica runs which request: the least loaded one."""

from __future__ import annotations

import heapq
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from ..engine.request import GenerateRequest


class Router:
    """Shares requests out by how many of this client's each replica has. Any thread may use it."""

    def __init__(self) -> None:
        self._num_in_flight: Counter[str] = Counter()
        self._lock = threading.Lock()

    def share_out(
        self, requests: Iterable[GenerateRequest], replica_ids: Sequence[str]
    ) -> dict[str, list[GenerateRequest]]:
        """Gives each request to the replica with the fewest, and counts it there.

        Args:
            requests: Requests to run.
            replica_ids: Where they can run; at least one.

        Returns:
            Replica -> its requests, in their order; replicas that got none are left out.
        """
        shares: dict[str, list[GenerateRequest]] = {}
        with self._lock:
            loads = [(self._num_in_flight[replica_id], replica_id) for replica_id in replica_ids]
            heapq.heapify(loads)
            for request in requests:
                load, replica_id = loads[0]
                heapq.heapreplace(loads, (load + 1, replica_id))
                shares.setdefault(replica_id, []).append(request)
            for replica_id, share in shares.items():
                self._num_in_flight[replica_id] += len(share)
        return shares

    def release(self, replica_id: str, count: int) -> None:
        """Counts requests as gone from a replica.

        Args:
            replica_id: The replica.
            count: How many of its requests ended or were taken back.
        """
        with self._lock:
            self._num_in_flight[replica_id] -= count
            if not self._num_in_flight[replica_id]:
                del self._num_in_flight[replica_id]
