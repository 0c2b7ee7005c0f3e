"""`Router`: sends a request to the replica that has seen the longest part of its prompt, unless that one is too busy.

A client remembers the beginnings of the prompts that it sent to each replica, so routing needs no remote call. Prompts
are remembered in blocks, each known by a hash of its content and of all blocks before it, as in the prefix cache.

The requests of an adapter have a home, the replica that got the latest of them. They move to the least loaded replica
when the home is too busy. So each replica loads few of a job's adapters, and one that joins gets its share of them.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from ...engine.request import Request

BLOCK_TOKENS = 64
BLOCK_CHARACTERS = 256
"""Length of a block: in tokens if the prompt has token ids, in characters if it has only text."""

MAX_BLOCKS = 64
"""Most blocks of a prompt that are hashed. Prompts that share their first four thousand tokens count as equal."""

MAX_KNOWN = 100_000
"""Most blocks that are remembered; the blocks not seen for the longest time are forgotten."""

MAX_ADAPTERS = 10_000
"""Most adapters whose replicas are remembered; the adapters not used for the longest time are forgotten. A replica
drops adapters sooner, but the requests of a dropped adapter still have to be loaded on one replica and not on all."""

MAX_LEAD = 32
"""Requests by which a replica may exceed the least loaded one and still get prompts and adapters that it has seen."""


class Router:
    """Chooses a replica for each request: one that has seen its prompt or adapter, or the least loaded. Thread-safe.

    Args:
        max_known: Most prompt blocks whose replicas are remembered.
    """

    def __init__(self, max_known: int = MAX_KNOWN) -> None:
        self._max_known = max_known
        self._num_in_flight: Counter[str] = Counter()
        self._seen_by: OrderedDict[int, set[str]] = OrderedDict()
        self._homes: OrderedDict[str, list[str]] = OrderedDict()
        """Name of an adapter -> the replicas that have got requests of it, the one that got the latest first."""
        self._lock = threading.Lock()

    def share_out(self, requests: Sequence[Request], replica_ids: Sequence[str]) -> dict[str, list[Request]]:
        """Assigns each request to a replica, and adds it to the number of requests in flight there.

        Args:
            requests: Requests to run.
            replica_ids: Replicas that can run them; at least one.

        Returns:
            Replica -> its requests in order; a replica without requests is left out.
        """
        # A few requests with the same beginning are spread over replicas.
        max_lead = min(MAX_LEAD, -(-len(requests) // len(replica_ids)))
        shares: dict[str, list[Request]] = {}
        with self._lock:
            for request in requests:
                replica_id = self._choose(request, replica_ids, max_lead)
                self._num_in_flight[replica_id] += 1
                shares.setdefault(replica_id, []).append(request)
        return shares

    def release(self, replica_id: str, count: int) -> None:
        """Subtracts requests from the number of requests in flight on a replica.

        Args:
            replica_id: The replica.
            count: Number of requests that have ended or were cancelled; a negative number adds requests.
        """
        with self._lock:
            self._num_in_flight[replica_id] -= count
            if not self._num_in_flight[replica_id]:
                del self._num_in_flight[replica_id]

    def _choose(self, request: Request, replica_ids: Sequence[str], max_lead: int) -> str:
        least = min(replica_ids, key=self._load)
        hashes = list(block_hashes(request))
        preferred = [*self._of_beginning(hashes, replica_ids), *self._of_adapter(request, replica_ids), least]
        chosen = next(one for one in preferred if self._load(one) - self._load(least) < max_lead)
        self._remember(hashes, chosen)
        if request.lora_request is not None:
            self._remember_adapter(request.lora_request.lora_name, chosen)
        return chosen

    def _of_beginning(self, hashes: Sequence[int], replica_ids: Sequence[str]) -> list[str]:
        """Returns the least loaded of the replicas that have seen the longest known beginning; [] if none has."""
        for block_hash in reversed(hashes):
            seen_by = self._seen_by.get(block_hash, set()).intersection(replica_ids)
            if seen_by:
                return [min(seen_by, key=self._load)]
        return []

    def _of_adapter(self, request: Request, replica_ids: Sequence[str]) -> list[str]:
        """Returns the replicas that have got requests of the adapter, the home of the adapter first."""
        if request.lora_request is None:
            return []
        return [one for one in self._homes.get(request.lora_request.lora_name, []) if one in replica_ids]

    def _load(self, replica_id: str) -> int:
        return self._num_in_flight[replica_id]

    def _remember(self, hashes: Iterable[int], replica_id: str) -> None:
        for block_hash in hashes:
            self._seen_by.setdefault(block_hash, set()).add(replica_id)
            self._seen_by.move_to_end(block_hash)
        while len(self._seen_by) > self._max_known:
            self._seen_by.popitem(last=False)

    def _remember_adapter(self, name: str, replica_id: str) -> None:
        homes = self._homes.setdefault(name, [])
        if replica_id in homes:
            homes.remove(replica_id)
        homes.insert(0, replica_id)
        self._homes.move_to_end(name)
        while len(self._homes) > MAX_ADAPTERS:
            self._homes.popitem(last=False)


def block_hashes(request: Request) -> Iterator[int]:
    """Yields a hash for each whole block of a prompt, at most `MAX_BLOCKS`; nothing for a prompt of embeddings.

    A hash covers the adapter, the cache salt, the block and all blocks before the block.

    Args:
        request: The request; its token ids are hashed if they are given, else its text.
    """
    prompt = request.prompt if request.prompt_token_ids is None else request.prompt_token_ids
    if prompt is None:
        return
    size = BLOCK_CHARACTERS if isinstance(prompt, str) else BLOCK_TOKENS
    adapter = "" if request.lora_request is None else request.lora_request.lora_name
    block_hash = hash((request.cache_salt or "", adapter))
    for end in range(size, min(len(prompt), size * MAX_BLOCKS) + 1, size):
        block = prompt[end - size : end]
        block_hash = hash((block_hash, block if isinstance(block, str) else tuple(block)))
        yield block_hash
