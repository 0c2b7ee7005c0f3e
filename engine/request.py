"""The requests that callers hand to an engine: `GenerateRequest` and `PoolingRequest`; `Request` is either."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import RequestError
from .lora.request import LoRARequest
from .outputs import RequestOutput
from .pooling.outputs import PoolingOutput, PoolingRequestOutput
from .pooling.params import PoolingParams
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from .inputs import ParsedPrompt


@dataclass(slots=True)
class GenerateRequest:
    """A request to generate tokens from a prompt. It can be pickled.

    Attributes:
        request_id: Id that no other unfinished request of the engine has.
        prompt: Text of the prompt; may be None if token ids or embeddings are given.
        prompt_token_ids: Token ids of the prompt; None lets the engine tokenise `prompt`.
        sampling_params: Sampling parameters.
        priority: Priority; requests with lower numbers run first.
        cache_salt: Non-empty text. The request shares cached prefixes only with requests that have the same salt. None
            shares them with all requests that have no salt.
        prompt_embeds: `[num_tokens, embedding_size]`, the embeddings of the prompt in place of its tokens; on the CPU
            if the request is sent to another process. None if the prompt is text or tokens.
        lora_request: Names the adapter; None for the model alone.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    sampling_params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    prompt_embeds: Tensor | None = field(default=None, repr=False, compare=False)
    lora_request: LoRARequest | None = None

    @property
    def params(self) -> SamplingParams:
        """The parameters of the request; requests of all kinds have this property."""
        return self.sampling_params

    @property
    def prompts(self) -> list[Any]:
        """The prompts of the request: the token ids of each if they are given, else its text."""
        return [self.prompt if self.prompt_token_ids is None else self.prompt_token_ids]

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of an output; None for no limit."""
        return self.sampling_params.max_tokens

    def failed(self, error: BaseException | RequestError) -> RequestOutput:
        """Returns the output of this request for the case that an error has ended it."""
        return RequestOutput.from_error(self.request_id, error, self.prompt, self.prompt_token_ids, self.lora_request)


@dataclass(slots=True)
class PoolingRequest:
    """A request to make a vector of each of one or several prompts. It can be pickled.

    Attributes:
        request_id: As in `GenerateRequest`.
        prompt: As in `GenerateRequest`.
        prompt_token_ids: As in `GenerateRequest`.
        pooling_params: Pooling parameters.
        priority: As in `GenerateRequest`.
        more_prompts: Further prompts, each a text, token ids or a `ParsedPrompt`, whose vectors are in the same output.
            If one of them cannot be run, the request fails.
        cache_salt: As in `GenerateRequest`, for all prompts of the request.
        prompt_embeds: Embeddings of the first prompt, as in `GenerateRequest`.
        lora_request: As in `GenerateRequest`.
        num_first_tokens: Number of tokens of the first text, if the first prompt is a pair of texts; None otherwise.
        prefix: Text in front of each text, such as a prompt that the model has for queries; None for the model's
            default prompt. Token ids have it already.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    pooling_params: PoolingParams
    priority: int = 0
    more_prompts: Sequence[str | list[int] | ParsedPrompt] = ()
    cache_salt: str | None = None
    prompt_embeds: Tensor | None = field(default=None, repr=False, compare=False)
    lora_request: LoRARequest | None = None
    num_first_tokens: int | None = None
    prefix: str | None = None

    @property
    def params(self) -> PoolingParams:
        """The parameters of the request; requests of all kinds have this property."""
        return self.pooling_params

    @property
    def prompts(self) -> list[Any]:
        """The prompts of the request: the token ids of each if they are given, else its text."""
        more = [one if isinstance(one, Sequence) else one.token_ids or one.text for one in self.more_prompts]
        return [self.prompt if self.prompt_token_ids is None else self.prompt_token_ids, *more]

    @property
    def max_tokens(self) -> int | None:
        """1, because a vector counts as one token where requests are ordered by length."""
        return 1

    def failed(self, error: BaseException | RequestError) -> PoolingRequestOutput[PoolingOutput]:
        """Returns the output of this request for the case that an error has ended it."""
        reason = error if isinstance(error, RequestError) else RequestError.from_exception(error)
        return PoolingRequestOutput(
            self.request_id,
            None,
            self.prompt_token_ids,
            error=reason,
            prompt=self.prompt,
            lora_request=self.lora_request,
        )


Request = GenerateRequest | PoolingRequest
"""A request of any kind that an engine runs."""

EngineOutput = RequestOutput | PoolingRequestOutput[PoolingOutput]
"""The output of a request of any kind."""


def longest_first(requests: Iterable[Request]) -> list[Request]:
    """Returns the requests by adapter, of an adapter by `max_tokens`, the largest first, and of equal ones by prompt.

    The requests of an adapter follow each other, so that few adapters are needed at a time. A set of requests ends
    sooner if its long outputs start first. Prompts with a common beginning follow each other, so that the KV cache
    still holds the beginning when the next of them runs.

    Args:
        requests: The requests of a call or of a row block. A request without `max_tokens` counts as the longest.
    """
    return sorted(requests, key=_order)


def _order(request: Request) -> tuple[str, int, list[int], str]:
    adapter = "" if request.lora_request is None else request.lora_request.lora_name
    prompt = (request.prompt_token_ids, "") if request.prompt_token_ids is not None else ([], request.prompt or "")
    return (adapter, -(request.max_tokens or sys.maxsize), *prompt)
