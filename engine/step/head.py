"""The end of a step: `Head` turns hidden states into tokens or vectors, which the host reads from a `StepResult`.

The engine's task makes the head, once.
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

__all__ = ["Head", "HostLogprobs", "RunningStep", "StepResult"]


@dataclass(frozen=True, slots=True)
class HostLogprobs:
    """`TopLogprobs`, on the host.

    Attributes:
        logprobs: `[num_positions, k + 1]` float32; column 0 is the token itself, then the k most probable.
        token_ids: `[num_positions, k + 1]` int64.
        ranks: `[num_positions]` int64, of the token itself.
    """

    logprobs: np.ndarray
    token_ids: np.ndarray
    ranks: np.ndarray


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, on the host.

    Attributes:
        drawn: One or several values for each sequence of the plan that samples, in order, each as its `Sequence.take`
            reads it: a token, which is negative where none could be drawn, or a vector.
        logprobs: Log-probabilities of the drawn tokens; None if no request asked.
        prompt_logprobs: Index in the plan -> log-probabilities of the prompt tokens after each computed position.
        num_drawn: How many values of `drawn` each of the sequences has; None where each has one.
    """

    drawn: list[Any]
    logprobs: HostLogprobs | None = None
    prompt_logprobs: Mapping[int, HostLogprobs] = field(default_factory=dict)
    num_drawn: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step whose work is queued on the device, and whose results will be on the host when it is done.

    Attributes:
        drawn: `[num_samples]` int64 tokens, or `[num_samples, size]` float32 vectors; None if no sequence samples.
        logprobs: The fields of `TopLogprobs`, of the drawn tokens; None if no request asked.
        prompt_logprobs: Index in the plan -> the same, of prompt tokens.
        split: Splits `drawn` into one value for each sequence: numbers, or with `list` the rows as arrays.
    """

    drawn: HostCopy | None = None
    logprobs: HostCopy | None = None
    prompt_logprobs: Mapping[int, HostCopy] = field(default_factory=dict)
    split: Callable[[np.ndarray], list[Any]] = np.ndarray.tolist

    def is_ready(self) -> bool:
        """Returns whether `result` would not wait."""
        copies = (self.drawn, self.logprobs, *self.prompt_logprobs.values())
        return all(copy is None or copy.is_ready() for copy in copies)

    def result(self) -> StepResult:
        """Waits for the step."""
        return StepResult(
            [] if self.drawn is None else self.split(self.drawn.wait()[0]),
            None if self.logprobs is None else HostLogprobs(*self.logprobs.wait()),
            {index: HostLogprobs(*copy.wait()) for index, copy in self.prompt_logprobs.items()},
        )


class Head(Protocol):
    """The end of a step, in the last stage of a model."""

    def enter(self, new_rows: Sequence[NewRow]) -> None:
        """Takes over the parameters of the sequences that enter."""
        ...

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan) -> RunningStep:
        """Turns hidden states into what the task is for. Nothing in it waits for the device.

        Args:
            plan: What was computed.
            hidden: `[num_tokens, embedding_size]`, or more rows where a recording was padded.
            sent: The plan on the device.

        Returns:
            The step; reading its result waits for it.
        """
        ...
