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
from .head import RunningStep
from .tables import SentPlan, Tables

__all__ = ["ClassHead", "LastTokenHead", "MeanHead", "PoolingHead"]


class PoolingHead(ABC):
    """Makes one vector of each prompt in the step that computes the last token of the prompt.

    Args:
        model: The last pp stage of a model.
        tables: Tables of the running sequences.

    Attributes:
        needs_every_token: Whether every token of a prompt must be computed, so that the prefix cache is not used.
    """

    needs_every_token: ClassVar[bool] = False

    def __init__(self, model: Decoder, tables: Tables) -> None:
        self._model = model
        self._host_copies = HostCopies(tables.tokens.device)

    def enter(self, new_rows: Sequence[NewRow]) -> None:  # noqa: B027  # Most heads store nothing.
        """Does nothing: the host applies the pooling parameters to the vectors (`Pooler`)."""

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan) -> RunningStep:
        """As `Head.finish`."""
        if not any(plan.samples):
            return RunningStep()
        return RunningStep(self._host_copies.start(self.vectors(hidden, sent.sampled)), split=list)

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


class ClassHead(PoolingHead):
    """Returns the logits of the classes, computed from the hidden state of each prompt's last token."""

    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """As `PoolingHead.vectors`."""
        return self._model.compute_class_logits(hidden[sampled[0]])


class MeanHead(PoolingHead):
    """Returns the mean of the hidden states of each prompt. The states of a chunked prompt are summed step by step."""

    needs_every_token = True

    def __init__(self, model: Decoder, tables: Tables) -> None:
        super().__init__(model, tables)
        shape = (len(tables.tokens), model.spec.embedding_size)
        self._sums = torch.zeros(shape, dtype=torch.float32, device=tables.tokens.device)

    def enter(self, new_rows: Sequence[NewRow]) -> None:
        """Sets the sums of prompts that start, or start again after a preemption, to zero."""
        for new in new_rows:
            self._sums[new.row].zero_()

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan) -> RunningStep:
        """As `Head.finish`; first adds the hidden states of this step to the sums of their prompts."""
        for row, states in zip(plan.rows, hidden.split(plan.counts), strict=True):
            self._sums[row] += states.sum(0, dtype=torch.float32)
        return super().finish(plan, hidden, sent)

    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """As `PoolingHead.vectors`."""
        _, rows, lengths = sampled
        return self._sums[rows] / lengths.unsqueeze(1)
