"""The workloads of the throughput benchmarks: lists of prompts and output lengths, the same on every machine.

"nano" is the list for which small engines publish figures: 256 requests of 100 to 1,024 random prompt tokens and 100 to
1,024 output tokens, drawn with seed 0 (142,827 tokens in, 133,966 out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from types import MappingProxyType
from typing import Any

MAX_TOKEN_ID = 10_000
TEMPERATURE = 0.6


@dataclass(frozen=True, slots=True)
class Scale:
    """The size of a workload.

    Attributes:
        num_requests: Number of requests.
        divisor: Divisor of all lengths.
        max_token_id: Largest token id of a prompt.
    """

    num_requests: int
    divisor: int
    max_token_id: int


FULL, TINY = Scale(256, 1, MAX_TOKEN_ID), Scale(6, 64, 500)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are all submitted at the start. Each runs to its last token, whatever tokens are drawn.

    Attributes:
        name: Name of the workload.
        prompts: Token ids of each request.
        max_tokens: Output tokens of each request.
        num_shared: Leading tokens that all prompts have in common.
    """

    name: str
    prompts: list[list[int]]
    max_tokens: list[int]
    num_shared: int = 0

    @property
    def num_input_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(self.max_tokens)

    def figures(self, seconds: float, ideal_s: float) -> dict[str, Any]:
        """Returns the fields that report a run of this workload.

        Args:
            seconds: Duration of the run.
            ideal_s: Duration at the limits of the machine, in seconds.
        """
        num_in, num_out = self.num_input_tokens, self.num_output_tokens
        return {
            "workload": self.name,
            "num_requests": len(self.prompts),
            "input_tokens": num_in,
            "output_tokens": num_out,
            "seconds": round(seconds, 4),
            "output_tok_per_s": round(num_out / seconds, 1),
            "total_tok_per_s": round((num_in + num_out) / seconds, 1),
            "ideal_s": round(ideal_s, 4),
            "share_of_limit": round(ideal_s / seconds, 4),
        }

    def shortened(self, divisor: int) -> Workload:
        """Returns the same prompts with outputs that are `divisor` times shorter."""
        if divisor == 1:
            return self
        lengths = [max(1, length // divisor) for length in self.max_tokens]
        return replace(self, name=f"{self.name}, outputs / {divisor}", max_tokens=lengths)

    def warm_up(self, max_num_batched_tokens: int) -> Workload:
        """Returns requests of the same lengths that go through every batch size, with prompts that no cache has.

        All requests have started before the first one ends; then they end one by one, the last one first.
        """
        largest = max(map(max, self.prompts))
        mirrored = [[largest - token for token in prompt] for prompt in self.prompts]
        num_prefill_steps = -(-self.num_input_tokens // max_num_batched_tokens) + 1
        lengths = [num_prefill_steps + len(self.prompts) - i for i in range(len(self.prompts))]
        return Workload(f"warm-up of {self.name}", mirrored, lengths, self.num_shared)


def nano(scale: Scale) -> Workload:
    """Returns the published list, with evenly spread lengths of prompts and outputs."""
    draw = Random(0)
    low, high = max(1, 100 // scale.divisor), 1024 // scale.divisor
    prompts = [_ids(draw, draw.randint(low, high), scale) for _ in range(scale.num_requests)]
    return Workload("nano", prompts, [draw.randint(low, high) for _ in prompts])


def fixed(num_in: int, num_out: int, scale: Scale) -> Workload:
    """Returns requests with equal lengths of prompts and equal lengths of outputs."""
    draw = Random(0)
    prompts = [_ids(draw, max(1, num_in // scale.divisor), scale) for _ in range(scale.num_requests)]
    return Workload(f"{num_in}/{num_out}", prompts, [max(1, num_out // scale.divisor)] * len(prompts))


def shared_prefix(scale: Scale) -> Workload:
    """Returns requests whose prompts share a long beginning (a system prompt) and have short ends of their own."""
    draw = Random(0)
    prefix = _ids(draw, 1024 // scale.divisor, scale)
    prompts = [prefix + _ids(draw, max(1, 128 // scale.divisor), scale) for _ in range(scale.num_requests)]
    return Workload("shared 1024+128/256", prompts, [256 // scale.divisor] * len(prompts), len(prefix))


def _ids(draw: Random, length: int, scale: Scale) -> list[int]:
    return [draw.randint(0, scale.max_token_id) for _ in range(length)]


WORKLOADS: Mapping[str, Callable[[Scale], Workload]] = MappingProxyType(
    {
        "nano": nano,
        "1024/1024": partial(fixed, 1024, 1024),
        "128/128": partial(fixed, 128, 128),
        "2048/128": partial(fixed, 2048, 128),
        "shared": shared_prefix,
    }
)
