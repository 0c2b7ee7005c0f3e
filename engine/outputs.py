"""What a finished request gives back. Plain data: it pickles, and holds no tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .errors import RequestError


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position.

    Attributes:
        logprob: Natural logarithm of the model's probability, before temperature, penalties and masks.
        rank: Place of the token among the whole vocabulary, 1 is the most probable.
        decoded_token: Text of the token; None when the engine has no tokenizer or `detokenize` is off.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence.

    Attributes:
        index: Which of the request's `n` sequences this is.
        text: Generated text, without the token or string that stopped it unless that was asked for.
        token_ids: Generated tokens, with the one that stopped it.
        cumulative_logprob: Sum of the log-probabilities of `token_ids`; None unless log-probabilities were asked for.
        logprobs: Per generated token, token id -> `Logprob`, the sampled token first.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"`` or ``"error"``.
        stop_reason: The stop string or stop token id that ended it; None for the end-of-sequence token and lengths.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Returns whether the sequence has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Where the time of one request went, and who ran it.

    Attributes:
        queue_s: Seconds from submission to the first step that ran it.
        ttft_s: Seconds from submission to its first token.
        e2e_s: Seconds from submission to its end.
        num_preemptions: How often its KV cache was taken away and recomputed.
        attempt: 1 for the first submission, plus one for every replica that died with it.
        replica_id: The replica that finished it; None outside a pool.
    """

    queue_s: float = 0.0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    num_preemptions: int = 0
    attempt: int = 1
    replica_id: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request and everything generated for it.

    Attributes:
        request_id: Unique identifier of the request.
        prompt: Prompt text; None if the prompt was given as token ids only.
        prompt_token_ids: The tokens the model saw.
        prompt_logprobs: Per prompt token, token id -> `Logprob` (None for the first); None unless asked for.
        outputs: The `n` generated sequences. A failed request has one, empty, with finish reason ``"error"``.
        finished: Whether all sequences have ended.
        metrics: Times of the request.
        num_cached_tokens: Prompt tokens whose KV cache was found rather than computed.
        error: Why the request failed; None if it did not.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int | None = None
    error: RequestError | None = None

    @property
    def num_generated_tokens(self) -> int:
        """Number of tokens of all generated sequences."""
        return sum(len(completion.token_ids) for completion in self.outputs)

    @classmethod
    def from_error(
        cls,
        request_id: str,
        error: BaseException | RequestError,
        prompt: Any = None,
        prompt_token_ids: list[int] | None = None,
    ) -> RequestOutput:
        """Builds the output of a request that failed.

        Args:
            request_id: Identifier of the request.
            error: What ended it.
            prompt: Its text, if it had one (anything else is not carried).
            prompt_token_ids: Its tokens, if they are known.

        Returns:
            A finished output with one empty sequence and the error.
        """
        reason = error if isinstance(error, RequestError) else RequestError.from_exception(error)
        empty = CompletionOutput(0, "", [], finish_reason="error")
        text = prompt if isinstance(prompt, str) else None
        return cls(request_id, text, prompt_token_ids, None, [empty], True, error=reason)
