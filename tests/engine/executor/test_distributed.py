"""What rank 0 sends to the other ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from millrace.engine.executor.distributed import DistributedExecutor
from millrace.engine.executor.plan_wire import decode_plan
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.parallel.rendezvous import Team
from millrace.engine.step_plan import StepPlan
from millrace.engine.structured.token_masks import TokenMasks


class Sent:
    """A channel that keeps what is sent over it."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def send(self, message: bytes) -> None:
        self.messages.append(message)


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "drawing"), [(4, 1, [1, 2, 3]), (1, 3, [2]), (2, 2, [2, 3])], ids=["tp", "pp", "both"]
)
def test_only_ranks_that_draw_get_the_token_masks(tp_size: int, pp_size: int, drawing: list[int]) -> None:
    channels: Any = [Sent() for _ in range(tp_size * pp_size - 1)]
    team = Team(ParallelContext.of_rank(0, tp_size, pp_size), channels, num_on_host=1)
    executor = DistributedExecutor(SimpleNamespace(execute=lambda plan: None), team)  # type: ignore[arg-type]
    sequences: Any = [SimpleNamespace(num_prompt_tokens=9)]
    plan = StepPlan(sequences, rows=[3], starts=[4], counts=[1], samples=[True])
    executor.execute(plan)
    plan.token_masks = TokenMasks([0], np.full((1, 5), 0b101, np.uint8))
    executor.execute(plan)
    for rank, channel in enumerate(channels, start=1):
        plain, masked = (decode_plan(message[1:]) for message in channel.messages)
        assert plain.rows == masked.rows == [3] and plain.token_masks is None
        assert (masked.token_masks is not None) == (rank in drawing)
        if masked.token_masks is not None:
            np.testing.assert_array_equal(masked.token_masks.bits, plan.token_masks.bits)
