"""What an engine is for: `Task`, and the `RequestHandler` that serves the requests of a task.

The engine, the scheduler and the runner never ask which task they work for. They call these objects where tasks differ.
"""

from __future__ import annotations

import numbers
import time
from abc import ABC, abstractmethod
from collections import abc
from typing import Any, ClassVar, Generic, Self, TypeVar

from ..config import EngineConfig
from ..errors import ConfigError, RequestError
from ..inputs import PromptReader, describe
from ..models.decoder import Decoder
from ..outputs import RequestMetrics
from ..pooling.params import PoolingParams
from ..pooling.scoring import Scoring
from ..request import EngineOutput, Request
from ..sequence import Sequence
from ..step.head import Head, StepResult
from ..step.tables import Tables
from ..step_plan import StepPlan
from ..text.tokenizer import Tokenizer

__all__ = ["RequestHandler", "Task", "first_error", "metrics_of"]

RequestT = TypeVar("RequestT", bound=Request)
SequenceT = TypeVar("SequenceT", bound=Sequence)


class Task(ABC):
    """What an engine is for. `choose_task` makes it once, from the engine's settings and the model's config.

    Attributes:
        name: Its name in `EngineConfig.task`.
        runner: The `EngineConfig.runner` that it belongs to.
        architecture_ending: How the names of the architectures end whose checkpoints are made for it.
        takes_any_model: Whether it also works with checkpoints that are made for another task.
        model_head: Name of the module of the model that turns hidden states into logits; None for none.
        unused_weights: Names of weights that a checkpoint may hold and this task does not read.
        decodes: Whether a sequence goes on after its prompt, one token a step.
        request_type: The class of the requests that it runs.
    """

    name: ClassVar[str]
    runner: ClassVar[str]
    architecture_ending: ClassVar[str]
    takes_any_model: ClassVar[bool] = False
    model_head: ClassVar[str | None] = None
    unused_weights: ClassVar[frozenset[str]] = frozenset()
    decodes: ClassVar[bool] = False
    request_type: ClassVar[type[Request]]

    @classmethod
    @abstractmethod
    def create(cls, config: EngineConfig, hf_config: Any) -> Self:
        """Makes the task of an engine.

        Args:
            config: The engine's settings.
            hf_config: The model's config.

        Raises:
            ConfigError: A setting does not fit the model.
            CheckpointError: The model's folder asks for something that this release cannot do.
        """

    @property
    @abstractmethod
    def refusal(self) -> str:
        """What the error says when the engine is given a request of another kind."""

    @abstractmethod
    def make_head(self, model: Decoder, tables: Tables) -> Head:
        """Makes the end of a step, from the last stage of a model and the tables of the running sequences."""

    @abstractmethod
    def make_handler(self, prompts: PromptReader) -> RequestHandler[Any, Any]:
        """Makes the object that serves requests, once the limits of the loaded model are known.

        Args:
            prompts: Turns prompts into tokens.
        """

    def check_pooling(self, params: PoolingParams) -> None:
        """Checks pooling parameters against the task and the model.

        Raises:
            ConfigError: The task makes no vectors.
            PoolingParamsError: The parameters ask for another task, or for dimensions that the model does not have.
        """
        raise ConfigError(self.refusal)

    def scoring(self, tokenizer: Tokenizer | None) -> Scoring:
        """Returns how the task scores pairs of texts.

        Raises:
            ConfigError: The engine cannot score.
        """
        raise ConfigError(self.refusal)


class RequestHandler(ABC, Generic[RequestT, SequenceT]):
    """Serves the requests of one task: it makes their sequences, and an output of the sequences that have ended.

    Args:
        task: The task.
        prompts: Turns prompts into tokens.
    """

    def __init__(self, task: Task, prompts: PromptReader) -> None:
        self.task = task
        self.prompts = prompts

    def open(self, request: Request) -> list[SequenceT]:
        """Checks a request and makes the sequences that the scheduler runs.

        Args:
            request: The request of a caller.

        Raises:
            PromptError: The prompt cannot be run.
            SamplingParamsError: The sampling parameters do not fit the model.
            PoolingParamsError: The pooling parameters do not fit the model.
            ConfigError: The request is of another kind than the engine runs.
        """
        if not isinstance(request.priority, numbers.Integral):
            raise ConfigError(f"priority must be an integer, lower first; got {describe(request.priority)}")
        if not isinstance(request, self.task.request_type):
            raise ConfigError(self.task.refusal)
        return self.make_sequences(request)

    @abstractmethod
    def make_sequences(self, request: RequestT) -> list[SequenceT]:
        """Makes the sequences of a request of the right kind; raises as `open`."""

    @abstractmethod
    def make_output(self, request: RequestT, sequences: list[SequenceT]) -> EngineOutput:
        """Makes the output of a request whose sequences have ended, or one of whose sequences has failed."""

    def prepare(self, plan: StepPlan) -> None:
        """Adds to a plan, before its step starts, what only this process knows about the sequences."""

    def record(self, plan: StepPlan, result: StepResult) -> None:
        """Keeps what the output will show of a step, before the sequences take what the step gave."""


def first_error(sequences: abc.Sequence[Sequence]) -> RequestError | None:
    """Returns the error of the first sequence that has failed; None if none has."""
    return next((sequence.error for sequence in sequences if sequence.error), None)


def metrics_of(sequences: abc.Sequence[Sequence]) -> RequestMetrics:
    """Returns the times of a request whose sequences have all ended."""
    first = sequences[0]
    return RequestMetrics(
        queue_s=first.scheduled_s - first.arrival_s,
        ttft_s=min(sequence.first_token_s for sequence in sequences) - first.arrival_s,
        e2e_s=time.monotonic() - first.arrival_s,
        num_preemptions=sum(sequence.num_preemptions for sequence in sequences),
    )
