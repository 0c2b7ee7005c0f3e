"""The end of a step: `Head` turns hidden states into tokens or vectors, which the host reads from a `StepResult`.

The task of the engine makes the head once, when the engine starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..device import HostCopy
from ..step_plan import NewRow, StepPlan
from .tables import SentPlan

__all__ = ["Draw", "Head", "HostLogprobs", "RunDecode", "RunningStep", "StepResult"]


Draw = Callable[[Tensor, Tensor], Tensor]
"""Takes hidden states `[size, embedding_size]` and sequences `[4, size]` (`SentPlan`), returns token ids `[size]`."""

RunDecode = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""Runs a decode step: takes `SentPlan.sequences`, the number of shared blocks (or None) and `Routing.packed` (or None).

Returns hidden states, `[num_seqs, hidden_size]`.
"""


@dataclass(frozen=True, slots=True)
class HostLogprobs:
    """The log-probabilities of a `TopLogprobs`, copied to the host.

    Attributes:
        logprobs: `[num_positions, k + 1]` float32; column 0 is the token at the position, then the k most probable.
        token_ids: `[num_positions, k + 1]` int64, the tokens of these log-probabilities.
        ranks: `[num_positions]` int64, rank of the token itself in the vocabulary; 1 is the most probable.
    """

    logprobs: np.ndarray
    token_ids: np.ndarray
    ranks: np.ndarray


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of a step, on the host.

    Attributes:
        drawn: One or several values for each sequence of the plan that samples, in order, in the form that
            `Sequence.take` reads: a token id, which is negative if no token could be drawn, a vector, or one for each
            token of a prompt.
        logprobs: Log-probabilities of the drawn tokens; None if no request asks for them.
        prompt_logprobs: Index in the plan -> log-probabilities of the prompt tokens after each computed position.
        num_drawn: Number of values in `drawn` for each sequence that samples, in order; None if each has one value.
    """

    drawn: list[Any]
    logprobs: HostLogprobs | None = None
    prompt_logprobs: Mapping[int, HostLogprobs] = field(default_factory=dict)
    num_drawn: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that is queued on the device, with the copies that bring its results to the host.

    Attributes:
        drawn: `[num_samples]` int64 tokens, or float32 vectors in one array; None if no sequence samples.
        logprobs: The fields of the `TopLogprobs` of the drawn tokens; None if no request asks for them.
        prompt_logprobs: Index in the plan -> the fields of the `TopLogprobs` of prompt tokens.
        split: Splits the array that `drawn` brings to the host into one value for each sequence that samples. The
            default returns token ids as Python integers; `list` returns one array for each vector.
    """

    drawn: HostCopy | None = None
    logprobs: HostCopy | None = None
    prompt_logprobs: Mapping[int, HostCopy] = field(default_factory=dict)
    split: Callable[[np.ndarray], list[Any]] = np.ndarray.tolist

    def is_ready(self) -> bool:
        """Returns whether all results are on the host, so that `result` does not have to wait."""
        copies = (self.drawn, self.logprobs, *self.prompt_logprobs.values())
        return all(copy is None or copy.is_ready() for copy in copies)

    def result(self) -> StepResult:
        """Waits until the step is done, and returns its results."""
        return StepResult(
            [] if self.drawn is None else self.split(self.drawn.wait()[0]),
            None if self.logprobs is None else HostLogprobs(*self.logprobs.wait()),
            {index: HostLogprobs(*copy.wait()) for index, copy in self.prompt_logprobs.items()},
        )


class Head(Protocol):
    """Computes the results of a step from hidden states; the ranks of the last pp stage have a head."""

    def enter(self, new_rows: Sequence[NewRow]) -> None:
        """Stores the parameters of the sequences that enter the tables in this step; called before `finish`."""
        ...

    @property
    def draw(self) -> Draw | None:
        """Draws the tokens of a decode step whose sequences ask for nothing else; None if the head draws no tokens."""
        ...

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan, draw: Draw | None = None) -> RunningStep:
        """Queues the computation of a step's results from its hidden states, and does not wait for the device.

        Args:
            plan: The step plan.
            hidden: Hidden states of the step, `[num_tokens, embedding_size]`, with more rows if the step was padded.
            sent: The plan on the device.
            draw: A recording of `self.draw` for the size of this step, which the head uses if it can; None for none.

        Returns:
            The running step, from which the results are read.
        """
        ...
