"""The requests of callers: a prompt to generate from, or prompts to pool."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import RequestError
from .outputs import RequestOutput
from .pooling.outputs import PoolingOutput, PoolingRequestOutput
from .pooling.params import PoolingParams
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class GenerateRequest:
    """What a caller hands in to have tokens generated; it pickles.

    Attributes:
        request_id: Unique among the engine's unfinished requests.
        prompt: Text; may be None when token ids are given.
        prompt_token_ids: Tokens; None lets the engine tokenise `prompt`.
        sampling_params: How to generate.
        priority: Lower runs first.
        cache_salt: Any text but an empty one: the request shares cached prefixes only with requests of the same salt.
            None shares them with all requests that have no salt.
        prompt_embeds: `[num_tokens, embedding_size]`, the embeddings of the prompt in place of its tokens. They are on
            the CPU where the request is to be sent to another process. None if the prompt is text or tokens.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    sampling_params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    prompt_embeds: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def params(self) -> SamplingParams:
        """Its parameters, as a request of any kind calls them."""
        return self.sampling_params

    @property
    def prompts(self) -> list[Any]:
        """All of its prompts: token ids where there are any, else text."""
        return [self.prompt if self.prompt_token_ids is None else self.prompt_token_ids]

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of an output; None for no limit."""
        return self.sampling_params.max_tokens

    def failed(self, error: BaseException | RequestError) -> RequestOutput:
        """Returns the output of the request, which an error has ended."""
        return RequestOutput.from_error(self.request_id, error, self.prompt, self.prompt_token_ids)


@dataclass(slots=True)
class PoolingRequest:
    """What a caller hands in to have a prompt, or several, made vectors; it pickles.

    Attributes:
        request_id: As in `GenerateRequest`.
        prompt: As in `GenerateRequest`.
        prompt_token_ids: As in `GenerateRequest`.
        pooling_params: How to pool.
        priority: Lower runs first.
        more_prompts: Further prompts, texts or tokens, whose vectors come in the same output. If one of them cannot be
            run, the request fails.
        cache_salt: As in `GenerateRequest`, for all of its prompts.
        prompt_embeds: As in `GenerateRequest`, of the first prompt.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    pooling_params: PoolingParams
    priority: int = 0
    more_prompts: Sequence[str | list[int]] = ()
    cache_salt: str | None = None
    prompt_embeds: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def params(self) -> PoolingParams:
        """Its parameters, as a request of any kind calls them."""
        return self.pooling_params

    @property
    def prompts(self) -> list[Any]:
        """All of its prompts: token ids where there are any, else text."""
        return [self.prompt if self.prompt_token_ids is None else self.prompt_token_ids, *self.more_prompts]

    @property
    def max_tokens(self) -> int | None:
        """1: a vector takes the place of one token."""
        return 1

    def failed(self, error: BaseException | RequestError) -> PoolingRequestOutput[PoolingOutput]:
        """Returns the output of the request, which an error has ended."""
        reason = error if isinstance(error, RequestError) else RequestError.from_exception(error)
        return PoolingRequestOutput(self.request_id, None, self.prompt_token_ids, error=reason, prompt=self.prompt)


Request = GenerateRequest | PoolingRequest
"""Any request that an engine runs."""

EngineOutput = RequestOutput | PoolingRequestOutput[PoolingOutput]
"""The output of a request of any kind."""


def longest_first(requests: Iterable[Request]) -> list[Request]:
    """Sorts requests by their limit of tokens, the longest first, and requests of one limit by their prompts.

    A set of requests ends sooner if its long outputs start first. Prompts with a common beginning stand side by side,
    so the cache still holds that beginning when the second of them runs.

    Args:
        requests: The requests of a call or of a block. A request without a limit counts as longest.
    """
    return sorted(requests, key=_order)


def _order(request: Request) -> tuple[int, list[int], str]:
    prompt = (request.prompt_token_ids, "") if request.prompt_token_ids is not None else ([], request.prompt or "")
    return (-(request.max_tokens or sys.maxsize), *prompt)
