"""`PoolingTask`: the base of the tasks that make vectors of prompts, and its request handler."""

from __future__ import annotations

import itertools
import sys
import time
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from ..errors import ConfigError, PoolingParamsError, RequestError
from ..inputs import ParsedPrompt, PromptReader, ReadPrompt, describe, hash_salt, parse_prompt
from ..models.decoder import Decoder
from ..pooling.config import PoolerConfig
from ..pooling.outputs import PoolingOutput, PoolingRequestOutput
from ..pooling.params import CUT_TO_LIMIT, PoolingParams
from ..pooling.pooler import Pooler
from ..request import PoolingRequest
from ..sampling_params import SamplingParams
from ..sequence import Sequence
from ..step.head import Head
from ..step.pooling_head import PoolingHead
from ..step.pooling_mode import PoolingMode
from ..step.tables import Tables
from .task import RequestHandler, Task, first_error, metrics_of

__all__ = ["PooledSequence", "PoolingHandler", "PoolingTask", "check_chunks"]

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
        prompt: Index of the prompt among those of its request; the parts of a long prompt have one index.
        vector: `[size]` float32, as the device has computed it, or `[num_tokens, size]` if each token has a vector;
            empty until a step has computed it.
    """

    prompt: int = 0
    vector: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def num_pooled(self) -> int:
        """Number of tokens of which the mean is taken."""
        return max(0, self.num_prompt_tokens - self.num_left_out)

    def take(self, drawn: np.ndarray) -> RequestError | None:
        """Stores the vector, and ends the sequence with finish reason ``"stop"``.

        Args:
            drawn: `[size]` or `[num_tokens, size]` float32, the vector.

        Returns:
            An error if the vector holds NaN or infinity, in which case the sequence is left as it was; else None.
        """
        if not np.isfinite(drawn).all():
            return NAN_VECTOR
        self.vector, self.finish_reason, self.first_token_s = drawn, "stop", time.monotonic()
        return None


@dataclass(frozen=True)
class PoolingTask(Task):
    """A task that makes one vector of each prompt, or one of each of its tokens, as the request asks.

    Attributes:
        pooler: Pooler that makes the result of a request from the vectors that the device has computed.
        modes: Modes that make the one vector of a prompt at the end of a step.
        size: Number of elements of the one vector of a prompt.
        pools_tokens: Whether requests that name no task get a vector of each token.
        includes_prompt: Whether the tokens of a prompt in front of a text count in means.
        token_task: Name of the pooling task that makes a vector of each token.
    """

    runner = "pooling"
    request_type = PoolingRequest
    head_type: ClassVar[type[PoolingHead]] = PoolingHead
    token_task: ClassVar[str]

    pooler: Pooler
    modes: tuple[type[PoolingMode], ...]
    size: int
    pools_tokens: bool = False
    includes_prompt: bool = True

    @classmethod
    def all_names(cls) -> tuple[str, ...]:
        """As `Task.all_names`: also the name of the task that makes a vector of each token."""
        return (cls.name, cls.token_task)

    @property
    def refusal(self) -> str:
        """Error message for a request to generate, see `Task.refusal`."""
        return (
            f"this engine does {self.name!r} and generates no text; use embed, classify or encode, or construct it "
            "with runner='generate' where the model can"
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes that the elements of a vector belong to; empty for embeddings."""
        return ()

    @property
    def needs_every_token(self) -> bool:
        """Whether the one vector of a prompt needs all of its tokens, so that the prefix cache is not used."""
        return any(mode.needs_every_token for mode in self.modes)

    def make_head(self, model: Decoder, tables: Tables) -> Head:
        """Makes the head that makes vectors, see `Task.make_head`."""
        return self.head_type(model, tables, self.modes)

    def make_handler(self, prompts: PromptReader) -> PoolingHandler:
        """Makes the handler of pooling requests, see `Task.make_handler`."""
        return PoolingHandler(self, prompts)

    def wants_tokens(self, params: PoolingParams) -> bool:
        """Returns whether a request wants a vector of each token."""
        return self.pools_tokens if params.task is None else params.task == self.token_task

    def check_pooling(self, params: PoolingParams) -> None:
        """Raises if the parameters do not fit the task or the model, see `Task.check_pooling`."""
        if params.task not in (None, self.name, self.token_task):
            raise PoolingParamsError(
                f"task={params.task!r}, but this engine does {self.name!r} and {self.token_task!r}; construct "
                "another one"
            )
        if params.dimensions is not None and (problem := self.problem_of(params.dimensions)) is not None:
            raise PoolingParamsError(problem)
        self._check_steps(params)

    def check_config(self) -> None:
        """Checks the pooler's own settings as those of a request.

        Raises:
            ConfigError: They do not fit the task or the model.
        """
        config = self.pooler.config
        if config.task is not None and config.task not in (self.name, self.token_task):
            raise ConfigError(f"pooler_config: task={config.task!r}, but this engine does {self.name!r}; drop it")
        params = PoolingParams(task=self.token_task, returned_token_ids=config.returned_token_ids)
        try:
            self.check_pooling(params)
        except PoolingParamsError as error:
            raise ConfigError(f"pooler_config: {error}") from error
        if config.dimensions is not None and (problem := self.problem_of(config.dimensions)) is not None:
            raise ConfigError(f"pooler_config: {problem}")

    def _check_steps(self, params: PoolingParams) -> None:
        if not self.wants_tokens(params):
            for name in ("step_tag_id", "returned_token_ids"):
                if getattr(params, name) is not None:
                    raise PoolingParamsError(f"{name} is for task={self.token_task!r}, a vector of each token; drop it")
        if params.returned_token_ids is not None:
            self.check_classes(params.returned_token_ids)

    def check_step_tag(self, params: PoolingParams) -> None:
        """Raises `PoolingParamsError` if a request wants the vectors of steps, and no token is set that ends one."""
        wants_steps = self.wants_tokens(params) and self.pooler.config.tok_pooling_type == "STEP"
        if wants_steps and self.pooler.step_tag_id(params) is None:
            raise PoolingParamsError("tok_pooling_type='STEP' needs the step tag; set step_tag_id")

    @abstractmethod
    def problem_of(self, dimensions: int) -> str | None:
        """Returns the error message if a vector cannot be shortened to this number of dimensions; None if it can."""

    @abstractmethod
    def check_classes(self, numbers: tuple[int, ...]) -> None:
        """Raises `PoolingParamsError` if the vectors of tokens have no classes of these numbers."""


def check_chunks(config: PoolerConfig) -> None:
    """Raises `ConfigError` if long prompts are to be run in parts, and the pooling is not a mean of them."""
    if config.enable_chunked_processing and config.types != ("MEAN",):
        raise ConfigError(
            "pooler_config: enable_chunked_processing takes the mean of the parts of a long prompt, so it needs "
            f"pooling_type 'MEAN'; this engine has {' and '.join(config.types)}"
        )


class PoolingHandler(RequestHandler[PoolingRequest, PooledSequence]):
    """Handles pooling requests: makes a sequence of each prompt, and an output with the vectors of the prompts.

    Args:
        task: The task of the engine.
        prompts: Reader that turns prompts into tokens.
    """

    def __init__(self, task: PoolingTask, prompts: PromptReader) -> None:
        super().__init__(task, prompts)
        self._pooling = task
        config = task.pooler.config
        self._chunks = bool(config.enable_chunked_processing)
        self._longest = (config.max_embed_len or sys.maxsize) if self._chunks else None
        self._prefixes: dict[str | None, list[int]] = {}

    def make_sequences(self, request: PoolingRequest) -> list[PooledSequence]:
        """Makes one sequence for each of the request's prompts, see `RequestHandler.make_sequences`.

        A prompt that is longer than the model's limit becomes several if the engine runs long prompts in parts.
        """
        params: Any = request.pooling_params
        if not isinstance(params, PoolingParams):
            raise PoolingParamsError(f"pooling_params must be PoolingParams; got {describe(params)}")
        self._pooling.check_pooling(params)
        self._pooling.check_step_tag(params)
        by_token = self._pooling.wants_tokens(params)
        if by_token and request.more_prompts:
            raise PoolingParamsError(
                "a request for a vector of each token has one prompt; make a request of each prompt"
            )
        first = ParsedPrompt(
            request.prompt,
            request.prompt_token_ids,
            embeddings=request.prompt_embeds,
            num_first_tokens=request.num_first_tokens,
        )
        more = [one if isinstance(one, ParsedPrompt) else parse_prompt(one) for one in request.more_prompts]
        prompts = [first, *more]
        read = [self._read(replace(prompt, prefix=request.prefix), params, by_token) for prompt in prompts]
        parts = [(index, part) for index, prompt in enumerate(read) for part in self._parts(prompt)]
        sequences = [self._sequence(request, index, prompt, part) for index, (prompt, part) in enumerate(parts)]
        if not self._pooling.includes_prompt and not by_token:
            self._leave_out(request.prefix, sequences)
        return sequences

    def probe_request(self) -> PoolingRequest:
        """Returns a request for the vector of a prompt of one token, see `RequestHandler.probe_request`."""
        return PoolingRequest("probe", None, [0], PoolingParams(task=self.task.name))

    def make_output(
        self, request: PoolingRequest, sequences: list[PooledSequence]
    ) -> PoolingRequestOutput[PoolingOutput]:
        """Makes the output with the vectors of all prompts, see `RequestHandler.make_output`."""
        if (failed := first_error(sequences)) is not None:
            return request.failed(failed)
        by_prompt = [list(parts) for _, parts in itertools.groupby(sequences, lambda one: one.prompt)]
        vectors = [self._finish(parts, request.pooling_params) for parts in by_prompt]
        if not all(np.isfinite(vector).all() for vector in vectors):
            return request.failed(NAN_OUTPUT)
        return PoolingRequestOutput(
            request.request_id,
            PoolingOutput(np.stack(vectors) if request.more_prompts else vectors[0], self._pooling.labels),
            [token_id for sequence in sequences for token_id in sequence.token_ids],
            sum(sequence.num_cached_tokens or 0 for sequence in sequences),
            prompt=request.prompt,
            metrics=metrics_of(sequences),
            lora_request=request.lora_request,
        )

    def _read(self, prompt: ParsedPrompt, params: PoolingParams, by_token: bool) -> ReadPrompt:
        """Reads a prompt, and cuts it if the request or the model's folder says so."""
        limit, most = self.prompts.max_model_len, params.truncate_prompt_tokens
        if most is not None and most > limit:
            raise PoolingParamsError(f"truncate_prompt_tokens={most} is more than max_model_len={limit}; lower it")
        if most is not None and prompt.embeddings is not None:
            raise PoolingParamsError("truncate_prompt_tokens cuts tokens, and the prompt is embeddings; drop it")
        if most == CUT_TO_LIMIT or (most is None and prompt.text is not None and self._cuts_texts):
            most = limit
        longest = None if by_token or prompt.embeddings is not None else self._longest
        return self.prompts.read(prompt, num_new_tokens=0, most=most, max_tokens=longest)

    @property
    def _cuts_texts(self) -> bool:
        """Whether the model's folder has long texts cut, which then never exceed the model's own limit."""
        tokenizer = self.prompts.tokenizer
        return tokenizer is not None and tokenizer.texts.max_tokens is not None and not self._chunks

    def _parts(self, prompt: ReadPrompt) -> list[ReadPrompt]:
        """Returns the parts in which a prompt is run: itself, if it is not longer than the model's limit."""
        size, ids = self.prompts.max_model_len, prompt.token_ids
        if len(ids) <= size:
            return [prompt]
        return [ReadPrompt(ids[start : start + size]) for start in range(0, len(ids), size)]

    def _leave_out(self, prefix: str | None, sequences: list[PooledSequence]) -> None:
        """Makes the means of prompts leave out the tokens of their prefix, as sentence-transformers counts them.

        The last of these tokens may have joined with the beginning of the text, so it is not compared.
        """
        if self.prompts.tokenizer is None:
            return
        if prefix not in self._prefixes:
            self._prefixes[prefix] = self.prompts.tokenizer.prefix_tokens(prefix)
        tokens = self._prefixes[prefix]
        if not tokens:
            return
        for _, parts in itertools.groupby(sequences, lambda one: one.prompt):
            left = len(tokens)
            for index, part in enumerate(parts):
                if index == 0 and part.token_ids[: left - 1] != tokens[: part.num_prompt_tokens][: left - 1]:
                    break
                part.num_left_out = min(left, part.num_prompt_tokens)
                left -= part.num_left_out

    def _finish(self, parts: list[PooledSequence], params: PoolingParams) -> np.ndarray:
        """Returns the result for a prompt that was run in one part or several."""
        (first, *others) = parts
        if first.pools_tokens:
            return self._pooling.pooler.finish_tokens(first.vector, first.token_ids, params)
        if not others:
            return self._pooling.pooler.finish(first.vector, params)
        weights = np.array([part.num_pooled for part in parts], dtype=np.float64)
        mean = np.average([part.vector for part in parts], axis=0, weights=weights if weights.any() else None)
        return self._pooling.pooler.finish(mean.astype(np.float32), params)

    def _sequence(self, request: PoolingRequest, index: int, prompt_index: int, prompt: ReadPrompt) -> PooledSequence:
        params = request.pooling_params
        by_token = self._pooling.wants_tokens(params)
        needs_all = by_token or self._pooling.needs_every_token
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
            reads_prefix_cache=not (params.skip_reading_prefix_cache or needs_all),
            pools_tokens=by_token,
            prompt=prompt_index,
        )
