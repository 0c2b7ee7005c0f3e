"""Identical requests of a process: one of them runs, the others take its output.

Requests are identical if prompt and parameters are, the seed among them. What the engine draws follows from these, so
the output is what each of them would have got.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ...engine import EngineOutput, PoolingRequest, Request, RequestOutput

MAX_TOKENS_KEPT = 1_000_000
"""Tokens of finished outputs that are remembered, some tens of megabytes."""

OUTPUT_TOKENS = 100
"""What an output takes besides its tokens, in tokens."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a waiting row gets.

    Attributes:
        item: What it was announced with.
        output: The output; None if it will not come.
        error: Why not.
    """

    item: Any
    output: EngineOutput | None
    error: BaseException | None = None


Inbox = queue.SimpleQueue[Arrival]


class Duplicates:
    """Who runs what. Any thread may use it."""

    def __init__(self, max_tokens_kept: int = MAX_TOKENS_KEPT) -> None:
        self._max_tokens_kept = max_tokens_kept
        self._lock = threading.Lock()
        self._waiting: dict[bytes, list[tuple[Inbox, Any]]] = {}
        self._finished: OrderedDict[bytes, EngineOutput] = OrderedDict()
        self._num_tokens: dict[bytes, int] = {}
        self._num_tokens_kept = 0

    def claim(self, key: bytes, inbox: Inbox, item: Any) -> bool:
        """Asks whether a request is to be run.

        Args:
            key: What `request_key` returns for it.
            inbox: Where the output goes if another one runs, or is finished.
            item: What it is announced with there.

        Returns:
            True if the caller is to run it, and to call `finish` or `abandon`.
        """
        with self._lock:
            if (output := self._finished.get(key)) is not None:
                self._finished.move_to_end(key)
                inbox.put(Arrival(item, output))
                return False
            if (waiting := self._waiting.get(key)) is not None:
                waiting.append((inbox, item))
                return False
            self._waiting[key] = []
            return True

    def finish(self, key: bytes, output: EngineOutput) -> None:
        """Hands an output to those who wait for it, and keeps it for a while if it is good."""
        with self._lock:
            waiting = self._waiting.pop(key)
            if output.error is None:
                self._keep(key, output)
        for inbox, item in waiting:
            inbox.put(Arrival(item, output))

    def abandon(self, key: bytes, error: BaseException) -> None:
        """Tells those who wait that the output will not come."""
        with self._lock:
            waiting = self._waiting.pop(key)
        for inbox, item in waiting:
            inbox.put(Arrival(item, None, error))

    def _keep(self, key: bytes, output: EngineOutput) -> None:
        num_tokens = len(output.prompt_token_ids or ()) + _output_size(output)
        self._num_tokens[key] = OUTPUT_TOKENS + num_tokens
        self._num_tokens_kept += self._num_tokens[key]
        self._finished[key] = output
        while self._num_tokens_kept > self._max_tokens_kept:
            oldest, _ = self._finished.popitem(last=False)
            self._num_tokens_kept -= self._num_tokens.pop(oldest)


def _output_size(output: EngineOutput) -> int:
    """Returns how many tokens or numbers an output has."""
    if isinstance(output, RequestOutput):
        return sum(len(one.token_ids) for one in output.outputs)
    return 0 if output.outputs is None else output.outputs.data.size


def request_key(request: Request, params: str) -> bytes:
    """Returns what two requests have in common exactly if they are identical.

    Args:
        request: A request, whose parameters hold a seed if they draw.
        params: Its parameters as text.

    Returns:
        A hash.
    """
    digest = hashlib.blake2b(params.encode(), digest_size=16)
    digest.update(repr(request.prompt if request.prompt_token_ids is None else request.prompt_token_ids).encode())
    if isinstance(request, PoolingRequest):
        digest.update(repr(request.more_prompts).encode())
    return digest.digest()
