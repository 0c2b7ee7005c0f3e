"""`PoolingTask`: the base of the tasks that make one vector of each prompt, and its request handler."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import PoolingParamsError, RequestError
from ..inputs import ParsedPrompt, PromptReader, ReadPrompt, describe, hash_salt, parse_prompt
from ..models.decoder import Decoder
from ..pooling.outputs import PoolingOutput, PoolingRequestOutput
from ..pooling.params import PoolingParams
from ..pooling.pooler import Pooler
from ..request import PoolingRequest
from ..sampling_params import SamplingParams
from ..sequence import Sequence
from ..step.head import Head
from ..step.pooling_head import PoolingHead
from ..step.tables import Tables
from .task import RequestHandler, Task, first_error, metrics_of

__all__ = ["PooledSequence", "PoolingHandler", "PoolingTask"]

NOTHING_DRAWN = SamplingParams(max_tokens=1, detokenize=False)
"""The sampling parameters of pooled sequences, which draw no token."""

NAN_VECTOR = RequestError(
    "NumericalError",
    "the model's hidden states of this request hold NaN; check the checkpoint, or try dtype='float32'",
    True,
)

NAN_OUTPUT = RequestError(
    "NumericalError", "the layers after the pooling made NaN or infinity of this request; check their weights", False
)


@dataclass(slots=True, eq=False)
class PooledSequence(Sequence):
    """A sequence that ends as soon as the vector of its prompt is computed.

    Attributes:
        vector: `[size]` float32, as the device has computed it; empty until a step has computed it.
    """

    vector: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    def take(self, drawn: np.ndarray) -> RequestError | None:
        """Stores the vector, and ends the sequence with finish reason ``"stop"``.

        Args:
            drawn: `[size]` float32, the vector.

        Returns:
            An error if the vector holds NaN or infinity, in which case the sequence is left as it was; else None.
        """
        if not np.isfinite(drawn).all():
            return NAN_VECTOR
        self.vector, self.finish_reason, self.first_token_s = drawn, "stop", time.monotonic()
        return None


@dataclass(frozen=True)
class PoolingTask(Task):
    """A task that makes one vector of each prompt.

    Attributes:
        pooler: Pooler that makes the result of a request from the vector that the device has computed.
        head: Class of the head, which makes the vectors at the end of a step.
        size: Number of elements of a vector.
    """

    runner = "pooling"
    request_type = PoolingRequest

    pooler: Pooler
    head: type[PoolingHead]
    size: int

    @property
    def refusal(self) -> str:
        """Error message for a request to generate, see `Task.refusal`."""
        return (
            f"this engine does {self.name!r} and generates no text; use embed, classify or encode, or construct it "
            "with runner='generate' where the model can"
        )

    def make_head(self, model: Decoder, tables: Tables) -> Head:
        """Makes the head that makes vectors, see `Task.make_head`."""
        return self.head(model, tables)

    def make_handler(self, prompts: PromptReader) -> PoolingHandler:
        """Makes the handler of pooling requests, see `Task.make_handler`."""
        return PoolingHandler(self, prompts)

    def check_pooling(self, params: PoolingParams) -> None:
        """Raises if the parameters do not fit the task or the model, see `Task.check_pooling`."""
        if params.task not in (None, self.name):
            raise PoolingParamsError(f"task={params.task!r}, but this engine does {self.name!r}; construct another one")
        if params.dimensions is not None and (problem := self.problem_of(params.dimensions)) is not None:
            raise PoolingParamsError(problem)

    @abstractmethod
    def problem_of(self, dimensions: int) -> str | None:
        """Returns the error message if a vector cannot be shortened to this number of dimensions; None if it can."""


class PoolingHandler(RequestHandler[PoolingRequest, PooledSequence]):
    """Handles pooling requests: makes a sequence of each prompt, and an output with the vectors of the prompts.

    Args:
        task: The task of the engine.
        prompts: Reader that turns prompts into tokens.
    """

    def __init__(self, task: PoolingTask, prompts: PromptReader) -> None:
        super().__init__(task, prompts)
        self._pooler = task.pooler
        self._needs_every_token = task.head.needs_every_token

    def make_sequences(self, request: PoolingRequest) -> list[PooledSequence]:
        """Makes one sequence for each of the request's prompts, see `RequestHandler.make_sequences`."""
        params: Any = request.pooling_params
        if not isinstance(params, PoolingParams):
            raise PoolingParamsError(f"pooling_params must be PoolingParams; got {describe(params)}")
        self.task.check_pooling(params)
        first = ParsedPrompt(
            request.prompt,
            request.prompt_token_ids,
            embeddings=request.prompt_embeds,
            num_first_tokens=request.num_first_tokens,
        )
        more = [one if isinstance(one, ParsedPrompt) else parse_prompt(one) for one in request.more_prompts]
        prompts = [first, *more]
        read = [self.prompts.read(prompt, num_new_tokens=0) for prompt in prompts]
        return [self._sequence(request, index, prompt) for index, prompt in enumerate(read)]

    def probe_request(self) -> PoolingRequest:
        """Returns a request for the vector of a prompt of one token, see `RequestHandler.probe_request`."""
        return PoolingRequest("probe", None, [0], PoolingParams())

    def make_output(
        self, request: PoolingRequest, sequences: list[PooledSequence]
    ) -> PoolingRequestOutput[PoolingOutput]:
        """Makes the output with the vectors of all prompts, see `RequestHandler.make_output`."""
        if (failed := first_error(sequences)) is not None:
            return request.failed(failed)
        vectors = [self._pooler.finish(sequence.vector, request.pooling_params) for sequence in sequences]
        if not all(np.isfinite(vector).all() for vector in vectors):
            return request.failed(NAN_OUTPUT)
        return PoolingRequestOutput(
            request.request_id,
            PoolingOutput(np.stack(vectors) if request.more_prompts else vectors[0]),
            [token_id for sequence in sequences for token_id in sequence.token_ids],
            sum(sequence.num_cached_tokens or 0 for sequence in sequences),
            prompt=request.prompt,
            metrics=metrics_of(sequences),
            lora_request=request.lora_request,
        )

    def _sequence(self, request: PoolingRequest, index: int, prompt: ReadPrompt) -> PooledSequence:
        return PooledSequence(
            request_id=request.request_id,
            index=index,
            params=NOTHING_DRAWN,
            seed=0,
            token_ids=prompt.token_ids,
            num_prompt_tokens=len(prompt.token_ids),
            # The step that computes the vector counts as one token. With it the sequence has reached this length, so
            # the scheduler plans no further step for it.
            max_tokens_total=len(prompt.token_ids) + 1,
            stop_token_ids={},
            priority=request.priority,
            cache_salt=hash_salt(request.cache_salt),
            spans=prompt.spans,
            num_first_tokens=prompt.num_first_tokens,
            reads_prefix_cache=not (request.pooling_params.skip_reading_prefix_cache or self._needs_every_token),
        )
