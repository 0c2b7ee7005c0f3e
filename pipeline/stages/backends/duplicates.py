"""`Duplicates`: of the identical requests of a process, one runs and the others get its output.

Requests are identical if their prompts, parameters and adapters are equal, seeds included. The engine's draws depend on
nothing else, so each of these requests would have got the same output.
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
"""Most tokens of finished outputs that are kept, some tens of megabytes."""

OUTPUT_TOKENS = 100
"""Memory of an output besides its tokens, expressed as a number of tokens."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """The message that a waiting row gets when its output arrives or fails.

    Attributes:
        item: Argument `item` of the call of `claim` for the row.
        output: The output; None if the identical request failed.
        error: The error of the identical request; None if there is an output.
    """

    item: Any
    output: EngineOutput | None
    error: BaseException | None = None


Inbox = queue.SimpleQueue[Arrival]


class Duplicates:
    """A table of running requests, the rows that wait for their outputs, and recent outputs. Any thread may use it."""

    def __init__(self, max_tokens_kept: int = MAX_TOKENS_KEPT) -> None:
        self._max_tokens_kept = max_tokens_kept
        self._lock = threading.Lock()
        self._waiting: dict[bytes, list[tuple[Inbox, Any]]] = {}
        self._finished: OrderedDict[bytes, EngineOutput] = OrderedDict()
        self._num_tokens: dict[bytes, int] = {}
        self._num_tokens_kept = 0

    def claim(self, key: bytes, inbox: Inbox, item: Any) -> bool:
        """Returns whether a request has to run; if an identical one runs or has finished, the inbox gets its output.

        Args:
            key: The `request_key` of the request.
            inbox: Queue that gets the output if an identical request runs or has finished.
            item: Any object; it is put into the inbox with the output.

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
        """Sends an output to the rows that wait for it, and keeps it for later rows if it has no error."""
        with self._lock:
            waiting = self._waiting.pop(key)
            if output.error is None:
                self._keep(key, output)
        for inbox, item in waiting:
            inbox.put(Arrival(item, output))

    def abandon(self, key: bytes, error: BaseException) -> None:
        """Sends the error of a request to the rows that wait for its output."""
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
    """Returns the size of an output: its number of tokens, or of elements of its vector."""
    if isinstance(output, RequestOutput):
        return sum(len(one.token_ids) for one in output.outputs)
    return 0 if output.outputs is None else output.outputs.data.size


def request_key(request: Request, params: str) -> bytes:
    """Returns a hash that is equal for two requests exactly if they are identical.

    Args:
        request: A request. If it samples, its parameters hold a seed.
        params: The parameters as text.
    """
    digest = hashlib.blake2b(params.encode(), digest_size=16)
    assert request.prompt_embeds is None, "rows have no embeddings, whose content this key would leave out"
    named = request.lora_request
    adapter = None if named is None else (named.lora_name, named.lora_path)
    digest.update(repr((request.prompts, request.cache_salt, adapter)).encode(errors="surrogatepass"))
    return digest.digest()
