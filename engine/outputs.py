"""`RequestOutput`: the result of a request that generates. It is plain data without tensors and can be pickled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .errors import RequestError
from .lora.request import LoRARequest


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position.

    Attributes:
        logprob: Natural logarithm of the token's probability, before temperature, penalties and masks.
        rank: Rank of the token by probability in the whole vocabulary; 1 is the most probable token.
        decoded_token: Text of the token; None if the engine has no tokenizer or `detokenize` is off. The tokens of an
            output (or a prompt) have the parts of its text that they add, so that joined they are the text: the last
            part of a character has all of it and the other parts nothing, and a token that is not in the text, such as
            the stop token, has an empty text. Other tokens at a position have texts that differ from each other:
            the name of a token, such as ``"<0xE2>"``, stands where its text is no whole character or is taken.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence.

    Attributes:
        index: Index of the sequence among the `n` sequences of the request.
        text: Generated text, without the stop token or stop string unless `include_stop_str_in_output` is on.
        token_ids: Generated token ids, the stop token included.
        cumulative_logprob: Sum of the log-probabilities of `token_ids`; None unless log-probabilities were asked for.
        logprobs: For each generated token a mapping, token id -> `Logprob`, that has the drawn token first; None
            unless log-probabilities were asked for.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"`` or ``"error"``.
        stop_reason: Stop string or stop token id that ended the sequence; None if the tokenizer's end-of-sequence token
            or a length limit ended it.
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
    """Durations of one request, its preemptions, and the replica that ran it.

    Attributes:
        queue_s: Seconds from the submission to the first step that computed tokens of the request.
        ttft_s: Seconds from the submission to the first token.
        e2e_s: Seconds from the submission to the end of the request.
        num_preemptions: Number of times that the KV cache of a sequence was released and recomputed.
        attempt: 1 for the first submission, plus 1 for every replica that died with the request.
        replica_id: Id of the replica that finished the request; None outside a pool.
    """

    queue_s: float = 0.0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    num_preemptions: int = 0
    attempt: int = 1
    replica_id: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """The result of one request that generates.

    Attributes:
        request_id: Id of the request.
        prompt: Text of the prompt; None if no text was given.
        prompt_token_ids: Token ids of the prompt; None if the prompt could not be tokenised.
        prompt_logprobs: For each prompt token a mapping, token id -> `Logprob` (None for the first token); None unless
            log-probabilities were asked for.
        outputs: The `n` generated sequences. A failed request has one empty sequence with finish reason ``"error"``.
        finished: Whether all sequences have ended.
        metrics: Durations and preemptions of the request.
        num_cached_tokens: Number of prompt tokens whose keys and values were found in the prefix cache.
        error: Error of a failed request; None if the request succeeded.
        lora_request: Names the adapter that the request was run with; None for the model alone.
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
    lora_request: LoRARequest | None = None

    @property
    def num_generated_tokens(self) -> int:
        """Number of generated tokens of all sequences together."""
        return sum(len(completion.token_ids) for completion in self.outputs)

    @classmethod
    def from_error(
        cls,
        request_id: str,
        error: BaseException | RequestError,
        prompt: Any = None,
        prompt_token_ids: list[int] | None = None,
        lora_request: LoRARequest | None = None,
    ) -> RequestOutput:
        """Makes the output of a request that failed.

        Args:
            request_id: Id of the request.
            error: Error that ended the request.
            prompt: Text of the prompt. A value that is no string is left out of the output.
            prompt_token_ids: Token ids of the prompt, if they are known.
            lora_request: Names the adapter of the request; None for the model alone.

        Returns:
            A finished output with one empty sequence and the error.
        """
        reason = error if isinstance(error, RequestError) else RequestError.from_exception(error)
        empty = CompletionOutput(0, "", [], finish_reason="error")
        text = prompt if isinstance(prompt, str) else None
        return cls(request_id, text, prompt_token_ids, None, [empty], True, error=reason, lora_request=lora_request)
