"""Host time of one engine step: planning and reading, with a model that costs nothing.

Prints one JSON line per number of running requests: the median step, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass

from millrace.engine.config import EngineConfig
from millrace.engine.engine import LLMEngine
from millrace.engine.inputs import InputProcessor
from millrace.engine.kv_cache import KVCacheManager
from millrace.engine.request import GenerateRequest
from millrace.engine.runner import StepResult
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.scheduler import Scheduler, StepPlan

BLOCK_SIZE, PROMPT_TOKENS, WARMUP_STEPS = 16, 100, 20


@dataclass(frozen=True)
class NullStep:
    """A step that ends at once; every sequence gets token 1."""

    num_samples: int

    def result(self) -> StepResult:
        """Returns a token for each sequence that samples."""
        return StepResult([1] * self.num_samples, None, {})


class NullExecutor:
    """Runs no model."""

    def execute(self, plan: StepPlan) -> NullStep:
        """Returns a step that is done."""
        return NullStep(sum(plan.samples))

    def close(self) -> None:
        """Has nothing to free."""


def make_engine(num_seqs: int, num_steps: int) -> LLMEngine:
    """Makes an engine without a model, filled with `num_seqs` requests that run for `num_steps` and more."""
    length = PROMPT_TOKENS + num_steps + 1
    kv_cache = KVCacheManager(num_seqs * (length // BLOCK_SIZE + 1), BLOCK_SIZE)
    engine = LLMEngine(
        config=EngineConfig(model="none"),
        tokenizer=None,
        default_params=SamplingParams(),
        inputs=InputProcessor(None, 10_000, length + 1, 20, [2], 0),
        scheduler=Scheduler(kv_cache, num_seqs, 8192),
        executor=NullExecutor(),
    )
    params = SamplingParams(max_tokens=num_steps, ignore_eos=True)
    for i in range(num_seqs):
        engine.add_request(GenerateRequest(str(i), None, [3 + i] * PROMPT_TOKENS, params))
    return engine


def measure(num_seqs: int, num_steps: int) -> list[float]:
    """Returns the milliseconds of each decode step."""
    engine = make_engine(num_seqs, num_steps + WARMUP_STEPS + 10)
    for _ in range(WARMUP_STEPS):
        engine.step()
    times_ms = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        times_ms.append((time.perf_counter() - start) * 1e3)
    return times_ms


def main() -> None:
    """Measures a few batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 64, 256, 1024])
    args = parser.parse_args()
    for num_seqs in args.num_seqs:
        times_ms = measure(num_seqs, args.steps)
        figures = {"median_ms": round(statistics.median(times_ms), 3), "max_ms": round(max(times_ms), 3)}
        print(json.dumps({"case": "host_overhead", "num_seqs": num_seqs, **figures}))


if __name__ == "__main__":
    main()
