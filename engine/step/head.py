"""What becomes of the hidden states at the end of a step: `Head`, and what it leaves for the host to read.

An engine that generates has a `TokenHead`, one that pools a `PoolingHead`: chosen once, when the engine is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

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
        token_ids: One for each sequence of the plan that samples, in order; negative where there is none.
        logprobs: Of those tokens, if any request asked.
        prompt_logprobs: Index in the plan -> of the prompt tokens after each computed position.
        vectors: In place of tokens, `[num, size]` float32: one for each sequence whose prompt is done; None where
            tokens are drawn.
    """

    token_ids: list[int]
    logprobs: HostLogprobs | None = None
    prompt_logprobs: Mapping[int, HostLogprobs] = field(default_factory=dict)
    vectors: np.ndarray | None = None

    @property
    def drawn(self) -> Sequence[int] | np.ndarray:
        """What the step gave for each sequence of the plan that samples, in order."""
        return self.token_ids if self.vectors is None else self.vectors


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step whose work is queued on the device, and whose results will be on the host when it is done.

    Attributes:
        token_ids: `[num_samples]` int64; None if no sequence samples.
        logprobs: The fields of `TopLogprobs`, of those tokens; None if no request asked.
        prompt_logprobs: Index in the plan -> the same, of prompt tokens.
        vectors: `[num_samples, size]` float32, where prompts are pooled.
    """

    token_ids: HostCopy | None = None
    logprobs: HostCopy | None = None
    prompt_logprobs: Mapping[int, HostCopy] = field(default_factory=dict)
    vectors: HostCopy | None = None

    def is_ready(self) -> bool:
        """Returns whether `result` would not wait."""
        copies = (self.token_ids, self.logprobs, self.vectors, *self.prompt_logprobs.values())
        return all(copy is None or copy.is_ready() for copy in copies)

    def result(self) -> StepResult:
        """Waits for the step."""
        return StepResult(
            [] if self.token_ids is None else self.token_ids.wait()[0].tolist(),
            None if self.logprobs is None else HostLogprobs(*self.logprobs.wait()),
            {index: HostLogprobs(*copy.wait()) for index, copy in self.prompt_logprobs.items()},
            None if self.vectors is None else self.vectors.wait()[0],
        )


class Head(Protocol):
    """The end of a step, in the last stage of a model."""

    def enter(self, new_rows: Sequence[NewRow]) -> None:
        """Takes over the parameters of the requests that enter."""
        ...

    def finish(self, plan: StepPlan, hidden: Tensor, sent: SentPlan) -> RunningStep:
        """Makes of hidden states what was asked for. Nothing in it waits for the device.

        Args:
            plan: What was computed.
            hidden: `[num_tokens, embedding_size]`, or more rows where a recording was padded.
            sent: The plan on the device.

        Returns:
            The step; reading its result waits for it.
        """
        ...
