"""Puts the result of a step into plain form, for the rank that reports it to rank 0."""

from __future__ import annotations

from typing import Any

from ..step.head import HostLogprobs, StepResult

__all__ = ["pack_result", "unpack_result"]


def pack_result(result: StepResult) -> list[Any]:
    """Returns a result as plain values and arrays, which `unpack_result` reads."""
    return [
        result.drawn,
        _pack_logprobs(result.logprobs),
        [[index, _pack_logprobs(logprobs)] for index, logprobs in result.prompt_logprobs.items()],
        result.num_drawn,
    ]


def unpack_result(packed: list[Any]) -> StepResult:
    """Returns the result of which `pack_result` made plain values."""
    drawn, logprobs, prompt_logprobs, num_drawn = packed
    return StepResult(
        drawn,
        None if logprobs is None else HostLogprobs(*logprobs),
        {index: HostLogprobs(*entry) for index, entry in prompt_logprobs},
        num_drawn,
    )


def _pack_logprobs(logprobs: HostLogprobs | None) -> list[Any] | None:
    return None if logprobs is None else [logprobs.logprobs, logprobs.token_ids, logprobs.ranks]
