"""The heads of pooling engines, such as `MeanHead`: they make one vector of each prompt and draw no tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..device import HostCopies
from ..models.decoder import Decoder
from ..step_plan import NewRow, StepPlan
from .head import Draw, RunningStep
from .head_routing import route_head, routed_head
from .tables import SentPlan, Tables

__all__ = [
    "ClassHead",
    "FirstClassHead",
    "FirstTokenHead",
    "LastTokenHead",
    "MaxHead",
    "MeanClassHead",
    "MeanHead",
    "PoolingHead",
]


class PoolingHead(ABC):
    """Makes one vector of each prompt in the step that computes the last token of the prompt.

    Args:
        model: The last pp stage of a model.
        tables: Tables of the running sequences.

    Attributes:
        needs_every_token: Whether every token of a prompt must be computed, so that the prefix cache is not used.
        draw: None, because no tokens are drawn.
    """

    needs_every_token: ClassVar[bool] = False
    draw: Draw | None = None

    def __init__(self, model: Decoder, tables: Tables) -> None:
        self._model = model
        self._tables = tables
        self._host_copies = HostCopies(tables.tokens.device, are_read=model.parallel.reports)

    def enter(self, new_rows: Sequence[NewRow]) -> None:  # noqa: B027  # Most heads store nothing.
        """Does nothing: the host applies the pooling parameters to the vectors (`Pooler`)."""

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan, draw: Draw | None = None) -> RunningStep:
        """As `Head.finish`."""
        if not any(plan.samples):
            return RunningStep()
        rows = [row for row, samples in zip(plan.rows, plan.samples, strict=True) if samples]
        with routed_head(self._model, route_head(self._model, self._tables, rows)):
            vectors = self.vectors(hidden, sent.sampled)
        return RunningStep(self._host_copies.start(vectors), split=list)

    @abstractmethod
    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """Makes the vectors of the prompts whose last token this step computes.

        Args:
            hidden: Hidden states of the step, `[num_tokens, embedding_size]`.
            sampled: `[3, num_samples]`: for each prompt whose last token is computed, the index of this token in
                `hidden`, the row of the prompt in the tables, and the length of the prompt.

        Returns:
            `[num_samples, size]` float32.
        """


class LastTokenHead(PoolingHead):
    """Returns the hidden state of each prompt's last token; in a causal model only this token attends to all others."""

    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """As `PoolingHead.vectors`."""
        return hidden[sampled[0]].float()


class EveryTokenHead(PoolingHead):
    """Makes a vector of all hidden states of each prompt. A chunked prompt is accumulated step by step."""

    needs_every_token = True

    def __init__(self, model: Decoder, tables: Tables) -> None:
        super().__init__(model, tables)
        shape = (len(tables.tokens), model.spec.output_size)
        self._states = torch.zeros(shape, dtype=torch.float32, device=tables.tokens.device)

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan, draw: Draw | None = None) -> RunningStep:
        """As `Head.finish`; first accumulates the hidden states of this step.

        A prompt that starts, or starts again after a preemption, replaces the state of its row.
        """
        for row, start, states in zip(plan.rows, plan.starts, hidden.float().split(plan.counts), strict=True):
            state = self._states[row]
            state.copy_(self.first(states) if start == 0 else self.next(state, states))
        return super().finish(plan, hidden, sent)

    @abstractmethod
    def first(self, states: Tensor) -> Tensor:
        """Returns the state `[embedding_size]` of the first tokens of a prompt, `[num_tokens, embedding_size]`."""

    @abstractmethod
    def next(self, state: Tensor, states: Tensor) -> Tensor:
        """Returns the state of a prompt with more tokens, from the state before them and their hidden states."""

    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """As `PoolingHead.vectors`."""
        return self._states[sampled[1]]


class MeanHead(EveryTokenHead):
    """Returns the mean of the hidden states of each prompt."""

    def first(self, states: Tensor) -> Tensor:
        """As `EveryTokenHead.first`: the sum."""
        return states.sum(0)

    def next(self, state: Tensor, states: Tensor) -> Tensor:
        """As `EveryTokenHead.next`: the sum."""
        return state + states.sum(0)

    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """As `PoolingHead.vectors`."""
        return super().vectors(hidden, sampled) / sampled[2].unsqueeze(1)


class MaxHead(EveryTokenHead):
    """Returns the largest value of each element of the hidden states of each prompt."""

    def first(self, states: Tensor) -> Tensor:
        """As `EveryTokenHead.first`: the largest values."""
        return states.amax(0)

    def next(self, state: Tensor, states: Tensor) -> Tensor:
        """As `EveryTokenHead.next`: the largest values."""
        return torch.maximum(state, states.amax(0))


class FirstTokenHead(EveryTokenHead):
    """Returns the hidden state of each prompt's first token."""

    def first(self, states: Tensor) -> Tensor:
        """As `EveryTokenHead.first`: the hidden state of the first token."""
        return states[0]

    def next(self, state: Tensor, states: Tensor) -> Tensor:
        """As `EveryTokenHead.next`: the state as it is."""
        return state


class Classifies(PoolingHead):
    """Computes the logits of the classes from the vectors of another head, with which it is combined."""

    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """As `PoolingHead.vectors`."""
        return self._model.compute_class_logits(super().vectors(hidden, sampled))  # type: ignore[safe-super]


class ClassHead(Classifies, LastTokenHead):
    """Returns the logits of the classes, computed from the hidden state of each prompt's last token."""


class FirstClassHead(Classifies, FirstTokenHead):
    """Returns the logits of the classes, computed from the hidden state of each prompt's first token."""


class MeanClassHead(Classifies, MeanHead):
    """Returns the logits of the classes, computed from the mean of the hidden states of each prompt."""
