"""The heads that pool: one vector for every prompt that is done, and no token."""

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
    """Makes one vector of each prompt, when its last token is computed.

    Args:
        model: The last stage of a model.
        tables: Of the running sequences.

    Attributes:
        needs_every_token: Whether every token of a prompt must be computed, and none be found in the prefix cache.
    """

    needs_every_token: ClassVar[bool] = False

    def __init__(self, model: Decoder, tables: Tables) -> None:
        self._model = model
        self._host_copies = HostCopies(tables.tokens.device)

    def enter(self, new_rows: Sequence[NewRow]) -> None:  # noqa: B027  # Most heads keep nothing.
        """As `Head.enter`: the host applies the parameters (`Pooler`), so nothing is kept here."""

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan) -> RunningStep:
        """As `Head.finish`."""
        if not any(plan.samples):
            return RunningStep()
        return RunningStep(self._host_copies.start(self.vectors(hidden, sent.sampled)), split=list)

    @abstractmethod
    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """Makes the vectors of the prompts that are done.

        Args:
            hidden: `[num_tokens, embedding_size]`, of the step.
            sampled: `[3, num_samples]`: the index in `hidden` of each prompt's last token, its row, its length.

        Returns:
            `[num_samples, size]` float32.
        """


class LastTokenHead(PoolingHead):
    """Takes the hidden state of each prompt's last token, the only one that has seen the whole prompt."""

    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """As `PoolingHead.vectors`."""
        return hidden[sampled[0]].float()


class ClassHead(PoolingHead):
    """Takes the logits of the classes, from the hidden state of each prompt's last token."""

    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """As `PoolingHead.vectors`."""
        return self._model.compute_class_logits(hidden[sampled[0]])


class MeanHead(PoolingHead):
    """Takes the mean of the hidden states of each prompt. A long prompt is summed up chunk by chunk."""

    needs_every_token = True

    def __init__(self, model: Decoder, tables: Tables) -> None:
        super().__init__(model, tables)
        shape = (len(tables.tokens), model.spec.embedding_size)
        self._sums = torch.zeros(shape, dtype=torch.float32, device=tables.tokens.device)

    def enter(self, new_rows: Sequence[NewRow]) -> None:
        """As `Head.enter`: a prompt that begins, or begins again, has no sum yet."""
        for new in new_rows:
            self._sums[new.row].zero_()

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan) -> RunningStep:
        """As `Head.finish`: adds up first."""
        for row, states in zip(plan.rows, hidden.split(plan.counts), strict=True):
            self._sums[row] += states.sum(0, dtype=torch.float32)
        return super().finish(plan, hidden, sent)

    def vectors(self, hidden: Tensor, sampled: Tensor) -> Tensor:
        """As `PoolingHead.vectors`."""
        _, rows, lengths = sampled
        return self._sums[rows] / lengths.unsqueeze(1)
