"""Identical requests of a process: one of them runs, the others take its output.

Requests are identical if their prompts and parameters are, the seed included. The engine's draws follow from these, so
each of them would have got the same output.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ....engine import EngineOutput, Request, RequestOutput

MAX_TOKENS_KEPT = 1_000_000
"""Tokens of finished outputs that are remembered, some tens of megabytes."""

OUTPUT_TOKENS = 100
"""Memory that an output takes besides its tokens, counted in tokens."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """The message that a waiting row gets.

    Attributes:
        item: The item that the row passed to `claim`.
        output: The output; None if it will not come.
        error: The reason why it will not come.
    """

    item: Any
    output: EngineOutput | None
    error: BaseException | None = None


Inbox = queue.SimpleQueue[Arrival]


class Duplicates:
    """The requests that run, the rows that wait for them, and recent outputs. Any thread may use it."""

    def __init__(self, max_tokens_kept: int = MAX_TOKENS_KEPT) -> None:
        self._max_tokens_kept = max_tokens_kept
        self._lock = threading.Lock()
        self._waiting: dict[bytes, list[tuple[Inbox, Any]]] = {}
        self._finished: OrderedDict[bytes, EngineOutput] = OrderedDict()
        self._num_tokens: dict[bytes, int] = {}
        self._num_tokens_kept = 0

    def claim(self, key: bytes, inbox: Inbox, item: Any) -> bool:
        """Decides whether a request has to run.

        Args:
            key: The `request_key` of the request.
            inbox: Queue that gets the output if an identical request runs or has finished.
            item: Any object, which comes with the output.

        Returns:
            True if the caller must run the request, and call `finish` or `abandon` afterwards.
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
        """Hands an output to the rows that wait for it, and keeps it for later rows if it has no error."""
        with self._lock:
            waiting = self._waiting.pop(key)
            if output.error is None:
                self._keep(key, output)
        for inbox, item in waiting:
            inbox.put(Arrival(item, output))

    def abandon(self, key: bytes, error: BaseException) -> None:
        """Tells the rows that wait that the output will not come."""
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
    """Returns a hash that two requests share exactly if they are identical.

    Args:
        request: A request. If it samples, its parameters hold a seed.
        params: The parameters as text.
    """
    digest = hashlib.blake2b(params.encode(), digest_size=16)
    digest.update(repr(request.prompts).encode())
    return digest.digest()
