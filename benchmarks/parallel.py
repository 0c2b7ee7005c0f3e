"""Measures the cost and the gain of running a model on several ranks of one host.

Prints JSON lines. "parallel/step": the median step of a model that computes next to nothing, in one process and on two
ranks. The difference at one layer is the control path (sending the step plan, waking up, embedding and logits in two
parts) and two sums; each further layer has two sums more. "parallel/throughput": a model that computes, with every way
to use the same number of threads. Cases for which the machine has too few cores or GPUs are skipped, and a line says
so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from millrace.engine.config import EngineConfig
from millrace.engine.device import num_physical_cores
from millrace.engine.engine import LLMEngine
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from models import SHAPES, ModelShape, write_config

WARMUP_STEPS = 30
DEPTHS = (1, 5)
"""Layers of the two models that compute next to nothing."""

COMPUTING = ModelShape("llama", 12, 768, 2048, 12, 4, 64, 16_384, is_tied=False, max_position_embeddings=1024)
"""A model of 100 million parameters, as a laptop runs it."""


@contextmanager
def open_engine(shape: ModelShape, **settings: Any) -> Iterator[LLMEngine]:
    """Opens an engine with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), shape)
        base = {"model": folder, "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 512}
        engine = LLMEngine.from_config(EngineConfig(**{**base, **settings}))
        try:
            yield engine
        finally:
            engine.close()


def add(engine: LLMEngine, num_seqs: int, num_in: int, num_out: int) -> None:
    """Adds requests of one size."""
    params = SamplingParams(temperature=0.6, max_tokens=num_out, ignore_eos=True)
    for i in range(num_seqs):
        engine.add_request(GenerateRequest(str(i), None, [3 + i % 90] * num_in, params))


def step_us(engine: LLMEngine, num_seqs: int, num_steps: int) -> float:
    """Returns the median decode step in microseconds."""
    add(engine, num_seqs, 16, WARMUP_STEPS + num_steps + 2)
    times = []
    for _ in range(WARMUP_STEPS):
        engine.step()
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    while engine.has_unfinished_requests():
        engine.step()
    return statistics.median(times) * 1e6


def measure_steps(num_seqs: int, num_steps: int, repeats: int, device: str) -> None:
    """Prints the time that two ranks add to a step."""
    # Eager in one process too, so that the same work, called in the same way, is compared.
    cases: dict[str, dict[str, Any]] = {
        "one process": {},
        "recorded": {"enforce_eager": False},
        "tp=2": {"tensor_parallel_size": 2},
    }
    best: dict[tuple[str, int], float] = {}
    for depth in DEPTHS:
        shape = replace(SHAPES["tiny"], num_layers=depth)
        for _ in range(repeats):  # In turns, so that other work of the machine affects all cases; the best run counts.
            for name, sizes in cases.items():
                settings = {"device": device, "enforce_eager": True, "num_threads": 1} | sizes
                with open_engine(shape, max_num_seqs=num_seqs, **settings) as engine:
                    measured = step_us(engine, num_seqs, num_steps)
                best[name, depth] = min(measured, best.get((name, depth), measured))
    for depth in DEPTHS:
        one, two = best["one process", depth], best["tp=2", depth]
        figures = {
            "num_seqs": num_seqs,
            "num_layers": depth,
            "one_process_us": round(one),
            "one_process_recorded_us": round(best["recorded", depth]),
            "tp2_us": round(two),
            "added_us": round(two - one),
        }
        print(json.dumps({"case": "parallel/step", **figures}), flush=True)


def measure_throughput(num_seqs: int, num_in: int, num_out: int, num_threads: int, device: str) -> None:
    """Prints tokens per second of every way to use the threads."""
    for name, tp_size, pp_size in (("one process", 1, 1), ("tp=2", 2, 1), ("pp=2", 1, 2), ("tp=2 pp=2", 2, 2)):
        case = {"case": "parallel/throughput", "ranks": name, "num_seqs": num_seqs, "in_out": f"{num_in}/{num_out}"}
        if (reason := too_small(tp_size * pp_size, device)) is not None:
            print(json.dumps({**case, "skipped": reason}), flush=True)
            continue
        sizes = {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size}
        threads = max(1, num_threads // (tp_size * pp_size))
        with open_engine(
            COMPUTING, device=device, num_threads=threads, max_num_seqs=num_seqs, enable_prefix_caching=False, **sizes
        ) as engine:
            seconds = []
            for num_tokens in (2, num_out):  # The first run warms up.
                add(engine, num_seqs, num_in, num_tokens)
                start = time.perf_counter()
                while engine.has_unfinished_requests():
                    engine.step()
                seconds.append(time.perf_counter() - start)
        rate = num_seqs * num_out / seconds[-1]
        print(json.dumps({**case, "threads_per_rank": threads, "output_tokens_per_s": round(rate, 1)}), flush=True)


def too_small(num_ranks: int, device: str) -> str | None:
    """Returns the reason why the machine cannot run so many ranks; None if it can."""
    if device == "cuda":
        num_gpus = torch.cuda.device_count()
        return None if num_gpus >= num_ranks else f"{num_ranks} ranks need a GPU each, and there are {num_gpus}"
    num_cores = num_physical_cores()
    return None if num_cores >= num_ranks else f"{num_ranks} ranks need a core each, and there are {num_cores}"


def main() -> None:
    """Measures steps and throughput."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--lengths", type=int, nargs=2, default=[128, 64], metavar=("IN", "OUT"))
    parser.add_argument("--only", choices=("step", "throughput"))
    args = parser.parse_args()
    for num_seqs in args.num_seqs:
        if args.only != "throughput":
            reason = too_small(2, args.device)
            if reason is None:
                measure_steps(num_seqs, args.steps, args.repeats, args.device)
            else:
                print(json.dumps({"case": "parallel/step", "num_seqs": num_seqs, "skipped": reason}), flush=True)
        if args.only != "step":
            num_in, num_out = args.lengths
            measure_throughput(num_seqs, num_in, num_out, num_physical_cores(), args.device)


if __name__ == "__main__":
    main()
