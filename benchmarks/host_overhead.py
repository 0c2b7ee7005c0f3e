"""Measures the host time of one decode step, with a model that computes nothing, and of the launchers of an eager step.

Prints one JSON line for each number of running requests and case, with the median step in milliseconds. The case
"scheduler" plans and reads steps. The case "engine" also does the host's work of the runner: it packs the step plan,
updates the tables, calls the (empty) model, samples from a vocabulary of 8 and reads the tokens. On a CPU that includes
the arithmetic of the sampler, which the host only launches on a GPU.

Then it prints what the launchers of attention, rotation, norms and gates take in the layers of an eager step, where
they plan once a step and where they plan in every layer (`launch_overhead.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from millrace.engine.config import EngineConfig
from millrace.engine.engine import LLMEngine
from millrace.engine.executor.executor import Executor, InProcessExecutor
from millrace.engine.inputs import PromptReader
from millrace.engine.kv_cache import KVCacheManager
from millrace.engine.models import DecoderSpec
from millrace.engine.parallel.context import SINGLE
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.scheduler import Scheduler
from millrace.engine.step.head import StepResult
from millrace.engine.step.runner import ModelRunner
from millrace.engine.step_plan import StepPlan
from millrace.engine.tasks.generate import Generate, GenerateHandler

BLOCK_SIZE, PROMPT_TOKENS, WARMUP_STEPS = 16, 100, 20
VOCAB_SIZE = 8


@dataclass(frozen=True)
class NullStep:
    """A step that has ended already; every sequence gets token 1."""

    num_samples: int

    def result(self) -> StepResult:
        """Returns a token for each sequence that samples."""
        return StepResult([1] * self.num_samples)


class NullExecutor:
    """An executor that runs neither a model nor a runner."""

    def execute(self, plan: StepPlan) -> NullStep:
        """Returns a step that has ended."""
        return NullStep(sum(plan.samples))

    def save_sharded_state(self, config: EngineConfig, folder: Path) -> None:
        """Has no weights to write."""

    def close(self) -> None:
        """Has nothing to free."""


class NullModel:
    """A model that computes nothing, whose hidden states and logits are constant."""

    spec = DecoderSpec(
        vocab_size=VOCAB_SIZE,
        hidden_size=1,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        max_position_embeddings=1,
        windows=(0,),
        embedding_size=1,
        tie_word_embeddings=False,
        rms_norm=True,
        norm_eps=1e-6,
        gated_mlp=False,
        activation="relu",
    )
    parallel = SINGLE
    dtype = torch.float32
    adapters = None

    def __init__(self, max_num_tokens: int) -> None:
        self._hidden = torch.zeros(max_num_tokens, 1)
        self._logits = torch.arange(VOCAB_SIZE, dtype=torch.float32).expand(max_num_tokens, -1).contiguous()

    def __call__(self, batch: Any, _kv_cache: Any) -> torch.Tensor:
        """Returns hidden states `[num_tokens, 1]`."""
        return self._hidden[: len(batch.token_ids)]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns logits `[num_rows, VOCAB_SIZE]`."""
        return self._logits[: len(hidden)]


def make_executor(case: str, num_seqs: int, num_blocks: int, length: int) -> Executor:
    """Makes the executor of a case."""
    if case == "scheduler":
        return NullExecutor()
    model: Any = NullModel(num_seqs * PROMPT_TOKENS)
    runner = ModelRunner(
        model,
        torch.device("cpu"),
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_seqs,
        max_model_len=length,
        dtype=torch.float32,
    )
    return InProcessExecutor(runner)


def make_engine(case: str, num_seqs: int, num_steps: int) -> LLMEngine:
    """Makes an engine without a model, with `num_seqs` requests that run for at least `num_steps` steps."""
    length = PROMPT_TOKENS + num_steps + 1
    num_blocks = num_seqs * (length // BLOCK_SIZE + 1)
    config = EngineConfig(model="none")
    engine = LLMEngine(
        config=config,
        tokenizer=None,
        default_params=SamplingParams(),
        handler=GenerateHandler(Generate(config, None), PromptReader(None, 10_000, length + 1), [2]),
        scheduler=Scheduler(KVCacheManager(num_blocks, BLOCK_SIZE), num_seqs, num_seqs * PROMPT_TOKENS),
        executor=make_executor(case, num_seqs, num_blocks, length + 1),
        overlap_depth=1,
    )
    params = SamplingParams(temperature=0.6, max_tokens=num_steps, ignore_eos=True)
    for i in range(num_seqs):
        engine.add_request(GenerateRequest(str(i), None, [3 + i] * PROMPT_TOKENS, params))
    return engine


def measure(case: str, num_seqs: int, num_steps: int) -> list[float]:
    """Returns the milliseconds of each decode step."""
    engine = make_engine(case, num_seqs, num_steps + WARMUP_STEPS + 10)
    for _ in range(WARMUP_STEPS):
        engine.step()
    times_ms = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        times_ms.append((time.perf_counter() - start) * 1e3)
    return times_ms


def main() -> None:
    """Measures both cases at several batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--layers", type=int, default=28)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for case in ("scheduler", "engine"):
        for num_seqs in args.num_seqs:
            times_ms = measure(case, num_seqs, args.steps)
            figures = {"median_ms": round(statistics.median(times_ms), 3), "max_ms": round(max(times_ms), 3)}
            print(json.dumps({"case": f"host_overhead/{case}", "num_seqs": num_seqs, **figures}))
    if importlib.util.find_spec("triton") is None:
        print(json.dumps({"case": "host_overhead/launchers", "skipped": "Triton is not installed"}))
        return
    import launch_overhead

    for line in launch_overhead.measure(args.layers, args.steps):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
