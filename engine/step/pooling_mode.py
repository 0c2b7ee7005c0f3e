"""`PoolingMode`: how the hidden states of a prompt become one vector, also if they come in several steps.

Most modes keep one state for each running prompt, `[size]` float32, to which every step adds its tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..device import to_device

__all__ = [
    "FirstToken",
    "LastToken",
    "Max",
    "Mean",
    "MeanSqrtLen",
    "PooledPrompts",
    "PoolingMode",
    "Runs",
    "WeightedMean",
]

LEFT_OUT = -1e9
"""The value of a token that is left out of a maximum, as in sentence-transformers."""


@dataclass(frozen=True, slots=True)
class Runs:
    """The hidden states of a step, in runs of the tokens of one prompt each.

    Attributes:
        states: `[num_tokens, size]` float32.
        rows: Row of each prompt in the tables.
        starts: Position of the first token of each run in its prompt.
        counts: Number of tokens of each run.
        left_out: `[num_runs]`: number of leading tokens of each prompt that means and maxima leave out.
    """

    states: Tensor
    rows: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]
    left_out: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """`[num_tokens]`: the position of each token in its prompt."""
        return np.concatenate([np.arange(start, start + n) for start, n in zip(self.starts, self.counts, strict=True)])

    def kept(self, filling: float = 0.0) -> Tensor:
        """Returns the hidden states with `filling` in the place of tokens that are left out."""
        if not self.left_out.any():
            return self.states
        are_out = self.positions < np.repeat(self.left_out, self.counts)
        return self.states.masked_fill(to_device(are_out, torch.bool, self.states.device).unsqueeze(1), filling)

    def sums(self, states: Tensor) -> Tensor:
        """Returns `[num_runs, size]`, the sum of the rows of each run in `states`, which has a row for each token."""
        return torch.stack([run.sum(0) for run in states.split(list(self.counts))])


@dataclass(frozen=True, slots=True)
class PooledPrompts:
    """The prompts whose last token a step computes.

    Attributes:
        hidden: Hidden states of the step, `[num_tokens, size]`.
        sampled: `[3, num_prompts]`: index of each prompt's last token in `hidden`, its row in the tables, its length.
        left_out: `[num_prompts]` int32, as in `Runs`; None if nothing is left out.
    """

    hidden: Tensor
    sampled: Tensor
    left_out: Tensor | None

    def sums_of(self, weigh: bool) -> Tensor:
        """Returns `[num_prompts, 1]` float32: the number of tokens that count, or the sum of their positions from 1."""
        lengths = self.sampled[2].float()
        out = torch.zeros_like(lengths) if self.left_out is None else torch.minimum(self.left_out.float(), lengths)
        sums = (lengths * (lengths + 1) - out * (out + 1)) / 2 if weigh else lengths - out
        return sums.clamp(min=1e-9).unsqueeze(1)


class PoolingMode(ABC):
    """Makes one vector of the hidden states of each prompt.

    Args:
        num_rows: Number of rows of the tables.
        size: Number of elements of a hidden state.
        device: Device of the hidden states.

    Attributes:
        needs_every_token: Whether every token of a prompt must be computed, so that the prefix cache is not used.
    """

    needs_every_token: ClassVar[bool] = False

    def __init__(self, num_rows: int, size: int, device: torch.device) -> None:  # noqa: B027  # Some keep nothing.
        pass

    def take(self, runs: Runs) -> None:  # noqa: B027  # Some modes need the last step of a prompt only.
        """Adds the tokens of a step. A prompt that starts, or starts again, replaces the state of its row."""

    @abstractmethod
    def vectors(self, prompts: PooledPrompts) -> Tensor:
        """Returns the vectors of prompts of which all tokens are taken, `[num_prompts, size]` float32."""


class LastToken(PoolingMode):
    """Takes the hidden state of the last token; in a causal model only this token attends to all others."""

    def vectors(self, prompts: PooledPrompts) -> Tensor:
        """As `PoolingMode.vectors`."""
        return prompts.hidden[prompts.sampled[0]].float()


class StatefulMode(PoolingMode):
    """Makes the vector from a state of each prompt, to which every step adds its tokens."""

    needs_every_token = True

    def __init__(self, num_rows: int, size: int, device: torch.device) -> None:
        super().__init__(num_rows, size, device)
        self._states = torch.zeros((num_rows, size), dtype=torch.float32, device=device)

    def take(self, runs: Runs) -> None:
        """As `PoolingMode.take`."""
        parts = self.parts(runs)
        rows = to_device(np.asarray(runs.rows), torch.int64, parts.device)
        if any(runs.starts):
            begins = to_device(self.begins(runs), torch.bool, parts.device).unsqueeze(1)
            parts = torch.where(begins, parts, self.join(self._states[rows], parts))
        self._states[rows] = parts

    def vectors(self, prompts: PooledPrompts) -> Tensor:
        """As `PoolingMode.vectors`: the states."""
        return self._states[prompts.sampled[1]]

    def begins(self, runs: Runs) -> np.ndarray:
        """Returns `[num_runs]`: whether the state of each run alone replaces the state of its prompt."""
        return np.equal(runs.starts, 0)

    @abstractmethod
    def parts(self, runs: Runs) -> Tensor:
        """Returns the states of the runs alone, `[num_runs, size]` float32."""

    @abstractmethod
    def join(self, states: Tensor, parts: Tensor) -> Tensor:
        """Returns the states of prompts, from those before a step and those of the runs of the step."""


class FirstToken(StatefulMode):
    """Takes the hidden state of the first token that is not left out; of the first one if all are."""

    def begins(self, runs: Runs) -> np.ndarray:
        """As `PoolingMode.begins`: also the run with the first token that is not left out."""
        return (self._offsets(runs) > 0) | np.equal(runs.starts, 0) | np.equal(runs.starts, runs.left_out)

    def parts(self, runs: Runs) -> Tensor:
        """As `PoolingMode.parts`."""
        firsts = np.cumsum(runs.counts) - runs.counts + self._offsets(runs)
        return runs.states[to_device(firsts, torch.int64, runs.states.device)]

    @staticmethod
    def _offsets(runs: Runs) -> np.ndarray:
        """Returns `[num_runs]`: the index of the token in its run, or 0 if the run does not have it."""
        offsets = runs.left_out - np.asarray(runs.starts)
        return np.where((offsets >= 0) & (offsets < runs.counts), offsets, 0)

    def join(self, states: Tensor, parts: Tensor) -> Tensor:
        """As `PoolingMode.join`: the states as they are."""
        return states


class Max(StatefulMode):
    """Takes the largest value of each element."""

    def parts(self, runs: Runs) -> Tensor:
        """As `PoolingMode.parts`."""
        return torch.stack([run.amax(0) for run in runs.kept(LEFT_OUT).split(list(runs.counts))])

    def join(self, states: Tensor, parts: Tensor) -> Tensor:
        """As `PoolingMode.join`."""
        return torch.maximum(states, parts)


class Mean(StatefulMode):
    """Takes the mean of all tokens."""

    def parts(self, runs: Runs) -> Tensor:
        """As `PoolingMode.parts`: the sums."""
        return runs.sums(runs.kept())

    def join(self, states: Tensor, parts: Tensor) -> Tensor:
        """As `PoolingMode.join`: the sums."""
        return states + parts

    def vectors(self, prompts: PooledPrompts) -> Tensor:
        """As `PoolingMode.vectors`."""
        return super().vectors(prompts) / prompts.sums_of(weigh=False)


class MeanSqrtLen(Mean):
    """Takes the sum of all tokens, divided by the root of their number."""

    def vectors(self, prompts: PooledPrompts) -> Tensor:
        """As `PoolingMode.vectors`."""
        return StatefulMode.vectors(self, prompts) / prompts.sums_of(weigh=False).sqrt()


class WeightedMean(Mean):
    """Takes the mean in which the first token weighs 1, the second 2, and so on."""

    def parts(self, runs: Runs) -> Tensor:
        """As `PoolingMode.parts`: the weighted sums."""
        weights = to_device(runs.positions + 1, torch.float32, runs.states.device)
        return runs.sums(runs.kept() * weights.unsqueeze(1))

    def vectors(self, prompts: PooledPrompts) -> Tensor:
        """As `PoolingMode.vectors`."""
        return StatefulMode.vectors(self, prompts) / prompts.sums_of(weigh=True)
