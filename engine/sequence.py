"""`Sequence`: the tokens of one sequence inside the engine, how many are computed, and the checks that end it.

A request with n > 1 becomes n sequences. They have the same prompt and share its blocks through the prefix cache.
"""

from __future__ import annotations

import enum
import time
from collections import abc
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .embeds.span import EmbeddedSpan
from .errors import RequestError
from .lora.adapter import Adapter
from .lora.routing import NO_SLOT
from .outputs import Logprob
from .sampling_params import ALL_FORBIDDEN, NO_TOKEN, SamplingParams
from .structured.grammar import Grammar
from .text.detokenizer import StopStringMatcher
from .text.spellings import NO_EDGES


class SequenceStatus(enum.Enum):
    """The state of a sequence in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence that the scheduler runs.

    The positions of a sequence have three states (`n` is `len(token_ids)`):

        [0, num_computed_tokens)              keys and values are in the cache, or will be after the steps in flight
        [num_computed_tokens, n)              the token is known and its keys and values are still to be computed
        [n, n + num_pending)                  a step in flight draws the token on the device; it is not read yet

    Attributes:
        request_id: Id of the request that the sequence belongs to.
        index: Index of the sequence among the sequences of its request.
        params: Sampling parameters.
        seed: Seed of the random draws. A draw depends only on the seed and the position, never on the batch.
        token_ids: Token ids of the prompt, followed by the output tokens that were read.
        num_prompt_tokens: Number of tokens of the prompt.
        max_tokens_total: Number of tokens, prompt included, at which the sequence ends with finish reason `length`.
        stop_token_ids: Tokens that end the sequence -> the stop reason that the output then reports.
        priority: Priority; sequences with lower numbers run first.
        arrival: Number of sequences of requests that were added before this one.
        matcher: Matcher that finds stop strings in the output; None if there are no stop strings.
        bad_word_edges: Spellings of words that must not occur in the output, as `Speller` returns them.
        cache_salt: Bytes that the block hashes begin with. Only sequences with equal salts share cached blocks.
        spans: Parts of the prompt that are given as embeddings, in order. Their token ids are placeholders.
        num_first_tokens: Number of tokens of the first text of a pair, which have token type 0; the others have type 1.
            None if all have type 0.
        reads_prefix_cache: Whether cached blocks may be used for the beginning of the prompt.
        pools_tokens: Whether each token of the prompt gets a vector of its own, in an engine that pools.
        num_left_out: Number of leading tokens of the prompt that its mean leaves out, in an engine that pools.
        grammar: State of the output in its grammar; None if the output follows no grammar. Only rank 0 has it.
        adapter: The adapter of the sequence; None for the model alone.
        adapter_slot: The adapter slot of the adapter while the sequence runs; `NO_SLOT` otherwise.
        status: State in the scheduler.
        num_computed_tokens: Number of tokens whose keys and values are in the cache after the steps in flight.
        num_pending: Number of tokens that steps in flight draw and that are not read yet.
        num_cached_tokens: Prompt tokens found in the prefix cache at the first admission; None before it.
        num_preemptions: Number of preemptions.
        block_ids: Ids of the KV cache blocks in order, a list for each group of layers; empty while the sequence waits.
        num_freed_blocks: Number of leading blocks that were freed for each group, because they lie before its window.
        block_hashes: Hashes of the full blocks, computed so far.
        num_published_blocks: Number of leading blocks that were offered to the prefix cache.
        row: Row in the runner's tables while the sequence runs; -1 otherwise.
        is_suspect: Whether a step with this sequence failed. A suspect runs alone until a step with it succeeds.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"`` or ``"error"``; None while the sequence is unfinished.
        stop_reason: The stop string or stop token id that ended the sequence, as the output reports it.
        error: The error that ended the sequence.
        logprobs: Log-probabilities of each output token, if the request asked for them.
        prompt_logprobs: Log-probabilities of each prompt token, if the request asked for them.
        arrival_s: Time of arrival, in seconds of `time.monotonic`.
        scheduled_s: Time of the first admission.
        first_token_s: Time at which the first output token was read.
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
    bad_word_edges: np.ndarray = field(default_factory=lambda: NO_EDGES)
    cache_salt: bytes = b""
    spans: abc.Sequence[EmbeddedSpan] = ()
    num_first_tokens: int | None = None
    reads_prefix_cache: bool = True
    pools_tokens: bool = False
    num_left_out: int = 0
    grammar: Grammar | None = None
    adapter: Adapter | None = None
    adapter_slot: int = NO_SLOT

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
        """Number of tokens of prompt and output, including tokens that are drawn but not read yet."""
        return len(self.token_ids) + self.num_pending

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens whose ids the host has read. Tokens that are drawn but not read yet are missing."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """Number of generated tokens whose ids the host has read; drawn tokens that are not read yet do not count."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def must_be_read(self) -> bool:
        """Whether the next token mask depends on a token that is not read yet: the grammar must accept it first."""
        return self.grammar is not None and self.num_pending > 0

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.status is SequenceStatus.FINISHED

    def take(self, drawn: Any) -> RequestError | None:
        """Takes the result of a step for this sequence. Afterwards `finish_reason` is set if the sequence has ended.

        Args:
            drawn: Token id. A negative number is a key of `NO_TOKEN` and stands for an error. Subclasses of other tasks
                take the value that their head computes.

        Returns:
            The error that ends the sequence; None if there is none.
        """
        if drawn == ALL_FORBIDDEN and self.grammar is not None and self.grammar.is_complete:
            # Only the end may follow, and min_tokens forbids it: the output is whole although it is short.
            self.first_token_s = self.first_token_s or time.monotonic()
            self.finish_reason = "stop"
            return None
        if drawn < 0:
            return NO_TOKEN[drawn]
        if self.grammar is not None and (error := self.grammar.accept(drawn)) is not None:
            return error
        self.append_output(drawn)
        return None

    def fail_unstarted(self, error: RequestError) -> None:
        """Ends a sequence that the scheduler never got with an error."""
        self.error, self.finish_reason, self.status = error, "error", SequenceStatus.FINISHED

    def append_output(self, token_id: int) -> bool:
        """Appends one generated token and checks whether the sequence ends with it.

        The checks run in this order: a stop token, a stop string, the length. Before token number `min_tokens` no stop
        token ends the sequence. A stop string ends it only if a token after number `min_tokens` completes the string.

        Args:
            token_id: The token id.

        Returns:
            Whether the sequence has ended. If so, `finish_reason` and `stop_reason` are set.
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
