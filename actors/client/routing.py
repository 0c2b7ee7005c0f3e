"""Which replica runs which request: the one that has seen the longest part of its prompt, unless it has too much to do.

A client keeps its own record of what it sent where, so that routing asks nobody. The record is of prompts' beginnings,
in blocks: a block is known by a hash of its content and of all before it, as in the engine's prefix cache.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from ...engine.request import Request

BLOCK_TOKENS = 64
BLOCK_CHARACTERS = 256
"""Length of a block of a prompt in tokens, and of one that is text still."""

MAX_BLOCKS = 64
"""Blocks of a prompt that are looked at. Who shares the first four thousand tokens is near enough."""

MAX_KNOWN = 100_000
"""Blocks that are remembered; the ones not met for the longest time are forgotten."""

MAX_LEAD = 32
"""Requests that a replica may have more than the least loaded one and still be given what it has seen before."""


class Router:
    """Shares requests out over replicas. Any thread may use it.

    Args:
        max_known: Blocks to remember.
    """

    def __init__(self, max_known: int = MAX_KNOWN) -> None:
        self._max_known = max_known
        self._num_in_flight: Counter[str] = Counter()
        self._seen_by: OrderedDict[int, set[str]] = OrderedDict()
        self._lock = threading.Lock()

    def share_out(self, requests: Sequence[Request], replica_ids: Sequence[str]) -> dict[str, list[Request]]:
        """Gives each request to a replica, and counts it there.

        Args:
            requests: Requests to run.
            replica_ids: Where they can run; at least one.

        Returns:
            Replica -> its requests, in their order; replicas that got none are left out.
        """
        # A few requests with one beginning are spread rather than sent to a single replica.
        max_lead = min(MAX_LEAD, -(-len(requests) // len(replica_ids)))
        shares: dict[str, list[Request]] = {}
        with self._lock:
            for request in requests:
                replica_id = self._choose(list(block_hashes(request)), replica_ids, max_lead)
                self._num_in_flight[replica_id] += 1
                shares.setdefault(replica_id, []).append(request)
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

    def _choose(self, hashes: list[int], replica_ids: Sequence[str], max_lead: int) -> str:
        least = min(replica_ids, key=self._load)
        chosen = least
        for block_hash in reversed(hashes):
            seen_by = self._seen_by.get(block_hash, set()).intersection(replica_ids)
            if seen_by:
                best = min(seen_by, key=self._load)
                chosen = best if self._load(best) - self._load(least) < max_lead else least
                break
        self._remember(hashes, chosen)
        return chosen

    def _load(self, replica_id: str) -> int:
        return self._num_in_flight[replica_id]

    def _remember(self, hashes: Iterable[int], replica_id: str) -> None:
        for block_hash in hashes:
            self._seen_by.setdefault(block_hash, set()).add(replica_id)
            self._seen_by.move_to_end(block_hash)
        while len(self._seen_by) > self._max_known:
            self._seen_by.popitem(last=False)


def block_hashes(request: Request) -> Iterator[int]:
    """Yields a hash for each whole block a prompt begins with; it stands for the block and all before it.

    Args:
        request: Its token ids are read, or its text where it has none.
    """
    prompt = request.prompt if request.prompt_token_ids is None else request.prompt_token_ids
    if prompt is None:
        return
    size = BLOCK_CHARACTERS if isinstance(prompt, str) else BLOCK_TOKENS
    block_hash = 0
    for end in range(size, min(len(prompt), size * MAX_BLOCKS) + 1, size):
        block = prompt[end - size : end]
        block_hash = hash((block_hash, block if isinstance(block, str) else tuple(block)))
        yield block_hash
