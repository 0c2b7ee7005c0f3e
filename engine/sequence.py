"""One sequence inside the engine: its tokens, how far they are computed, and when it ends.

A request with n > 1 becomes n sequences, which find each other's prompt in the prefix cache.
"""

from __future__ import annotations

import enum
import time
from collections import abc
from dataclasses import dataclass, field
from typing import Any

from .embeds.span import EmbeddedSpan
from .errors import RequestError
from .outputs import Logprob
from .sampling_params import NO_TOKEN, SamplingParams
from .structured.grammar import Grammar
from .text.detokenizer import StopStringMatcher


class SequenceStatus(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence the scheduler runs.

    The tokens of a sequence, by what is known of them (`n` is `len(token_ids)`):

        [0, num_computed_tokens)              keys and values are in the cache, or will be after the steps in flight
        [num_computed_tokens, n)              known, to be computed
        [n, n + num_pending)                  sampled on the device by a step in flight, not read yet

    Attributes:
        request_id: Of the request it belongs to.
        index: Which of the request's sequences it is.
        params: Sampling parameters.
        seed: Seed of its draws; with the position it names a draw, whatever the batch.
        token_ids: Prompt, then output.
        num_prompt_tokens: Length of the prompt.
        max_tokens_total: Number of tokens at which it ends by length.
        stop_token_ids: Tokens that end it; the value is what `stop_reason` says.
        priority: Lower runs first.
        arrival: Order of arrival.
        matcher: Finds its stop strings; None if it has none.
        bad_word_ids: Token sequences it must not generate.
        cache_salt: Bytes that its block hashes begin with: only sequences with equal salts share cached blocks.
        spans: Parts of its prompt that come as embeddings, in order; their token ids are placeholders.
        reads_prefix_cache: Whether cached blocks may stand for the beginning of its prompt.
        grammar: Where it is in the grammar of its output; None if it may say anything. Known on rank 0 only.
        block_ids: Its KV cache blocks in order, a list for each group of layers; empty while it waits.
        num_freed_blocks: For each group, how many leading blocks it holds no more, since a window has passed them.
        row: Its row in the runner's tables while it runs.
        is_suspect: Whether a step it was part of failed, so that it now runs alone.
    """

    request_id: str
    index: int
    params: SamplingParams
    seed: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens_total: int
    stop_token_ids: dict[int, int | None]
    priority: int = 0
    arrival: int = 0
    matcher: StopStringMatcher | None = None
    bad_word_ids: list[list[int]] = field(default_factory=list)
    cache_salt: bytes = b""
    spans: abc.Sequence[EmbeddedSpan] = ()
    reads_prefix_cache: bool = True
    grammar: Grammar | None = None

    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    num_pending: int = 0
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    block_ids: list[list[int]] = field(default_factory=list)
    num_freed_blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    row: int = -1
    is_suspect: bool = False

    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: RequestError | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)

    arrival_s: float = field(default_factory=time.monotonic)
    scheduled_s: float = 0.0
    first_token_s: float = 0.0

    def __lt__(self, other: Sequence) -> bool:
        return (self.priority, self.arrival) < (other.priority, other.arrival)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, those still on the device included."""
        return len(self.token_ids) + self.num_pending

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def must_be_read(self) -> bool:
        """Whether what it may say next depends on a token that is still on the device."""
        return self.grammar is not None and self.num_pending > 0

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self.status is SequenceStatus.FINISHED

    def take(self, drawn: Any) -> RequestError | None:
        """Takes what a step gave; `finish_reason` says whether the sequence has ended.

        Args:
            drawn: A token; a negative one is a key of `NO_TOKEN`. A sequence of another task takes what its head gives.

        Returns:
            Why the sequence cannot go on; None if nothing is wrong.
        """
        if drawn < 0:
            return NO_TOKEN[drawn]
        if self.grammar is not None and (error := self.grammar.accept(drawn)) is not None:
            return error
        self.append_output(drawn)
        return None

    def append_output(self, token_id: int) -> bool:
        """Takes one generated token and says whether it ends the sequence.

        Order of the checks: a stop token, a stop string, the length. Of the first `min_tokens` tokens the last may be a
        stop token, but none may complete a stop string.

        Args:
            token_id: The token.

        Returns:
            Whether the sequence has ended; `finish_reason` and `stop_reason` say why.
        """
        if not self.num_output_tokens:
            self.first_token_s = time.monotonic()
        self.token_ids.append(token_id)
        num_past_min = self.num_output_tokens - self.params.min_tokens
        if num_past_min >= 0 and token_id in self.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", self.stop_token_ids[token_id]
        elif self.matcher is not None and self.matcher.push(token_id, num_past_min > 0):
            self.finish_reason, self.stop_reason = "stop", self.matcher.matched
        elif len(self.token_ids) >= self.max_tokens_total:
            self.finish_reason = "length"
        return self.finish_reason is not None
