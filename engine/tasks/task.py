"""`Task`: the kind of work that an engine does, and `RequestHandler`, which handles the requests of a task.

The engine, the scheduler and the runner have no conditions on the task. They call these objects where tasks differ.
"""

from __future__ import annotations

import numbers
import time
from abc import ABC, abstractmethod
from collections import abc
from typing import Any, ClassVar, Generic, Self, TypeVar

from ..config import EngineConfig
from ..errors import ConfigError, MillraceError, RequestError, UserError
from ..inputs import PromptReader, describe
from ..models.decoder import Decoder
from ..outputs import RequestMetrics
from ..pooling.params import PoolingParams
from ..pooling.scoring import Scoring, ScoringOptions
from ..request import EngineOutput, Request
from ..sequence import Sequence
from ..step.head import Head, StepResult
from ..step.tables import Tables
from ..step_plan import StepPlan
from ..text.tokenizer import PLAIN, TextSettings
from ..weights.head_rows import HeadRows

__all__ = ["RequestHandler", "Task", "first_error", "metrics_of"]

RequestT = TypeVar("RequestT", bound=Request)
SequenceT = TypeVar("SequenceT", bound=Sequence)


class Task(ABC):
    """The kind of work that an engine does. `choose_task` makes it from the engine's settings and the model's config.

    Attributes:
        name: Name of the task in `EngineConfig.task`.
        runner: Value of `EngineConfig.runner` that the task belongs to.
        architecture_endings: Endings of the names of the architectures whose checkpoints are made for the task.
        takes_any_model: Whether the task also works with checkpoints that are made for another task.
        model_head: Name of the module of the model that turns hidden states into logits; None if the task uses none.
        unused_weights: Names of weights that a checkpoint may hold although the task does not use them.
        decodes: Whether sequences have decode steps after the prompt, one token each.
        request_type: Class of the requests that the engine accepts.
        head_rows: Rows of the checkpoint's output head that the head of the task is made of; None for none.
    """

    name: ClassVar[str]
    runner: ClassVar[str]
    architecture_endings: ClassVar[tuple[str, ...]]
    takes_any_model: ClassVar[bool] = False
    model_head: ClassVar[str | None] = None
    unused_weights: ClassVar[frozenset[str]] = frozenset()
    decodes: ClassVar[bool] = False
    request_type: ClassVar[type[Request]]
    head_rows: HeadRows | None = None

    @classmethod
    @abstractmethod
    def create(cls, config: EngineConfig, hf_config: Any) -> Self:
        """Makes the task of an engine.

        Args:
            config: Settings of the engine.
            hf_config: Config of the model.

        Raises:
            ConfigError: A setting does not fit the model.
            CheckpointError: The model's folder asks for a kind of pooling that this release does not have.
        """

    @classmethod
    def all_names(cls) -> tuple[str, ...]:
        """Returns the values of `EngineConfig.task` that ask for the task."""
        return (cls.name,)

    @classmethod
    def text_settings(cls, config: EngineConfig) -> TextSettings:
        """Returns how plain texts become prompts; most tasks leave them as they are.

        Raises:
            CheckpointError: The model's folder has a wrong setting, or one that is not implemented.
        """
        return PLAIN

    @property
    @abstractmethod
    def refusal(self) -> str:
        """Message of the error that the engine raises for a request of another kind."""

    @abstractmethod
    def make_head(self, model: Decoder, tables: Tables) -> Head:
        """Makes the head, which turns hidden states into tokens or vectors at the end of a step.

        Args:
            model: The last pp stage of the model.
            tables: Tokens and parameters of the running sequences.
        """

    @abstractmethod
    def make_handler(self, prompts: PromptReader) -> RequestHandler[Any, Any]:
        """Makes the request handler of the engine, after the model is loaded.

        Args:
            prompts: Reader that turns prompts into tokens, with the limits of the loaded model.
        """

    def check_pooling(self, params: PoolingParams) -> None:
        """Checks pooling parameters against the task and the model.

        Raises:
            ConfigError: The task does not make vectors.
            PoolingParamsError: The parameters ask for another task, or for dimensions that the model does not have.
        """
        raise ConfigError(self.refusal)

    def scoring(self, options: ScoringOptions) -> Scoring:
        """Returns the object that scores pairs of texts with the vectors of the task.

        Args:
            options: What the call asks for.

        Raises:
            ConfigError: The engine cannot score pairs of texts, or not in the way that the call asks for.
        """
        raise ConfigError(self.refusal)


class RequestHandler(ABC, Generic[RequestT, SequenceT]):
    """Handles the requests of one task: makes their sequences, and makes their outputs when the sequences have ended.

    Args:
        task: The task of the engine.
        prompts: Reader that turns prompts into tokens.
    """

    def __init__(self, task: Task, prompts: PromptReader) -> None:
        self.task = task
        self.prompts = prompts

    def open(self, request: Request) -> list[SequenceT]:
        """Checks a request and makes the sequences that the scheduler runs.

        Args:
            request: The request of a caller.

        Returns:
            The sequences of the request.

        Raises:
            PromptError: The prompt cannot be run.
            SamplingParamsError: The sampling parameters do not fit the model.
            PoolingParamsError: The pooling parameters do not fit the model.
            ConfigError: The engine does not run requests of this kind, or the priority is no integer.
        """
        if not isinstance(request.priority, numbers.Integral):
            raise ConfigError(f"priority must be an integer, lower first; got {describe(request.priority)}")
        if not isinstance(request, self.task.request_type):
            raise ConfigError(self.task.refusal)
        try:
            return self.make_sequences(request)
        except MillraceError:
            raise
        except Exception as error:  # A value of one request that no check has caught must not fail other requests.
            raise UserError(f"the request cannot be run: {type(error).__name__}: {error!s:.200}") from error

    @abstractmethod
    def make_sequences(self, request: RequestT) -> list[SequenceT]:
        """Makes the sequences of a request whose kind `open` has checked; raises the errors that `open` documents."""

    @abstractmethod
    def probe_request(self) -> RequestT:
        """Returns a request of one token, which every working engine of the task can run in one step."""

    @abstractmethod
    def make_output(self, request: RequestT, sequences: list[SequenceT]) -> EngineOutput:
        """Makes the output of a request after all of its sequences have ended, or after one has failed."""

    def prepare(self, plan: StepPlan) -> None:
        """Adds the data of a plan that only rank 0 can compute, such as token masks, before the step starts."""

    def record(self, plan: StepPlan, result: StepResult) -> None:
        """Stores parts of a step's result for the outputs, such as log-probabilities.

        The engine calls it before the sequences take the drawn tokens or vectors of the step.
        """


def first_error(sequences: abc.Sequence[Sequence]) -> RequestError | None:
    """Returns the error of the first sequence that has failed; None if none has."""
    return next((sequence.error for sequence in sequences if sequence.error), None)


def metrics_of(sequences: abc.Sequence[Sequence]) -> RequestMetrics:
    """Returns the durations and the preemptions of a request whose sequences have all ended."""
    first = sequences[0]
    return RequestMetrics(
        queue_s=first.scheduled_s - first.arrival_s,
        ttft_s=min(sequence.first_token_s for sequence in sequences) - first.arrival_s,
        e2e_s=time.monotonic() - first.arrival_s,
        num_preemptions=sum(sequence.num_preemptions for sequence in sequences),
    )
