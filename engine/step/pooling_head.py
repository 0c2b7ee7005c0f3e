"""`PoolingHead`: the end of a step of a pooling engine, with a vector of each prompt or of each of its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..device import HostCopies, to_device
from ..models.decoder import Decoder
from ..step_plan import NewRow, StepPlan
from .head import Draw, RunningStep
from .head_routing import route_head, routed_head
from .pooling_mode import PooledPrompts, PoolingMode, Runs
from .tables import SentPlan, Tables

__all__ = ["ClassHead", "PoolingHead"]


class PoolingHead:
    """Makes the vectors of each prompt in the step that computes the last token of the prompt.

    A prompt gets one vector, or one for each of its tokens if its sequence says so.

    Args:
        model: The last pp stage of a model.
        tables: Tables of the running sequences.
        modes: Types of the modes that make the one vector of a prompt. The vectors of several follow each other.

    Attributes:
        draw: None, because no tokens are drawn.
    """

    draw: Draw | None = None

    def __init__(self, model: Decoder, tables: Tables, modes: Sequence[type[PoolingMode]]) -> None:
        self._model = model
        self._tables = tables
        num_rows, device = len(tables.tokens), tables.tokens.device
        self._modes = [mode(num_rows, model.spec.output_size, device) for mode in modes]
        self._host_copies = HostCopies(device, are_read=model.parallel.reports)
        self._by_token, self._left_out = np.zeros(num_rows, dtype=bool), np.zeros(num_rows, dtype=np.int32)
        self._held: dict[int, list[Tensor]] = {}
        """Row in the tables -> vectors of the tokens so far, of prompts that go on and want all of them."""

    def enter(self, new_rows: Sequence[NewRow]) -> None:
        """Notes which vectors the sequences want. The host applies the pooling parameters to them (`Pooler`)."""
        for new in new_rows:
            self._by_token[new.row] = new.sequence.pools_tokens
            self._left_out[new.row] = new.sequence.num_left_out
            self._held.pop(new.row, None)

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan, draw: Draw | None = None) -> RunningStep:
        """As `Head.finish`."""
        hidden = hidden[: plan.num_tokens]
        by_token = self._by_token[plan.rows]
        tokens = self._take_tokens(plan, hidden, np.flatnonzero(by_token).tolist()) if by_token.any() else {}
        self._take_prompts(plan, hidden, np.flatnonzero(~by_token).tolist())
        sampled = np.flatnonzero(plan.samples)
        if not len(sampled):
            return RunningStep()
        whole = np.flatnonzero(~by_token[sampled])
        vectors = self._vectors(plan, hidden, sent, sampled, whole) if len(whole) else None
        if vectors is not None and not tokens:
            return RunningStep(self._host_copies.start(vectors), split=list)
        rows_of_prompts = iter(() if vectors is None else vectors)
        parts = [tokens[i] if by_token[i] else next(rows_of_prompts) for i in sampled.tolist()]
        flat = torch.cat([part.reshape(-1) for part in parts])
        return RunningStep(self._host_copies.start(flat), split=partial(_split, [tuple(one.shape) for one in parts]))

    def project(self, vectors: Tensor) -> Tensor:
        """Makes results of pooled vectors, or of the hidden states of tokens, `[n, embedding_size]`.

        Returns:
            `[n, size]` float32: here the vectors themselves.
        """
        return vectors.float()

    def _take_prompts(self, plan: StepPlan, hidden: Tensor, indices: list[int]) -> None:
        """Hands the tokens of prompts that get one vector to the modes."""
        modes = [mode for mode in self._modes if mode.needs_every_token]
        if not modes or not indices:
            return
        rows, starts, counts = ([of[i] for i in indices] for of in (plan.rows, plan.starts, plan.counts))
        states = _runs(plan, hidden, indices).float()
        runs = Runs(states, rows, starts, counts, self._left_out[rows])
        for mode in modes:
            mode.take(runs)

    def _vectors(
        self, plan: StepPlan, hidden: Tensor, sent: SentPlan, sampled: np.ndarray, whole: np.ndarray
    ) -> Tensor:
        """Returns the vectors of the prompts that end in this step, of those `whole` of the `sampled` ones."""
        device = hidden.device
        of_prompts = sent.sampled
        if len(whole) < len(sampled):
            of_prompts = of_prompts[:, to_device(whole, torch.int64, device)]
        rows = [plan.rows[i] for i in sampled[whole].tolist()]
        left_out = self._left_out[rows]
        prompts = PooledPrompts(
            hidden, of_prompts, to_device(left_out, torch.int32, device) if left_out.any() else None
        )
        vectors = [mode.vectors(prompts) for mode in self._modes]
        return self._project(vectors[0] if len(vectors) == 1 else torch.cat(vectors, 1), rows)

    def _take_tokens(self, plan: StepPlan, hidden: Tensor, indices: list[int]) -> dict[int, Tensor]:
        """Makes vectors of all tokens of some sequences.

        Returns:
            Index in the plan -> `[num_tokens, size]` float32, for each of the prompts that end in this step.
        """
        rows, counts = [plan.rows[i] for i in indices], [plan.counts[i] for i in indices]
        vectors = self._project(_runs(plan, hidden, indices), np.repeat(rows, counts).tolist())
        ended = {}
        for i, row, part in zip(indices, rows, vectors.split(counts), strict=True):
            held = self._held.pop(row, []) if plan.starts[i] else []
            if plan.samples[i]:
                ended[i] = torch.cat((*held, part)) if held else part
            else:
                self._held[row] = [*held, part.clone()]  # A copy, because the part keeps those of other prompts.
        return ended

    def _project(self, vectors: Tensor, rows: Sequence[int]) -> Tensor:
        with routed_head(self._model, route_head(self._model, self._tables, rows)):
            return self.project(vectors)


class ClassHead(PoolingHead):
    """Computes the logits of the classes of a classifier."""

    def project(self, vectors: Tensor) -> Tensor:
        """As `PoolingHead.project`: the logits of the classes."""
        return self._model.compute_class_logits(vectors)


def _runs(plan: StepPlan, hidden: Tensor, indices: list[int]) -> Tensor:
    """Returns the hidden states of some sequences of a plan, in its order."""
    if len(indices) == len(plan.rows):
        return hidden
    runs = hidden.split(plan.counts)
    return torch.cat([runs[i] for i in indices])


def _split(shapes: Sequence[tuple[int, ...]], flat: np.ndarray) -> list[Any]:
    """Returns the arrays of these shapes that follow each other in a flat array."""
    ends = list(accumulate(map(math.prod, shapes)))
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)]
