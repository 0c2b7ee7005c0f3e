"""The head of an engine that pools: one vector for every prompt that is done, and no token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..device import HostCopies
from ..models.decoder import Decoder
from ..step_plan import NewRow, StepPlan
from .head import RunningStep
from .tables import SentPlan, Tables

__all__ = ["MeanHead", "PoolingHead"]


class PoolingHead:
    """Takes the hidden state of each prompt's last token, and its classes where the model has any.

    Args:
        model: The last stage of a model.
        tables: Of the running requests.
    """

    def __init__(self, model: Decoder, tables: Tables) -> None:
        self._model = model
        self._host_copies = HostCopies(tables.tokens.device)

    def enter(self, new_rows: Sequence[NewRow]) -> None:
        """As `Head.enter`: nothing here depends on the parameters, which the host heeds (`Pooler`)."""

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan) -> RunningStep:
        """As `Head.finish`."""
        if not any(plan.samples):
            return RunningStep()
        vectors = self._model.compute_vectors(hidden[sent.sampled[0]])
        return RunningStep(vectors=self._host_copies.start(vectors))


class MeanHead:
    """Takes the mean of the hidden states of each prompt; every token must be computed, none be found in a cache.

    Args:
        model: The last stage of a model.
        tables: Of the running requests.
    """

    def __init__(self, model: Decoder, tables: Tables) -> None:
        device = tables.tokens.device
        self._sums = torch.zeros(len(tables.tokens), model.spec.embedding_size, dtype=torch.float32, device=device)
        self._host_copies = HostCopies(device)

    def enter(self, new_rows: Sequence[NewRow]) -> None:
        """As `Head.enter`: a prompt that begins, or begins again, has no sum yet."""
        for new in new_rows:
            self._sums[new.row].zero_()

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan) -> RunningStep:
        """As `Head.finish`: a long prompt is summed up chunk by chunk."""
        for row, states in zip(plan.rows, hidden.split(plan.counts), strict=True):
            self._sums[row] += states.sum(0, dtype=torch.float32)
        if not any(plan.samples):
            return RunningStep()
        _, rows, lengths = sent.sampled
        vectors = self._sums[rows] / lengths.unsqueeze(1)
        return RunningStep(vectors=self._host_copies.start(vectors))
