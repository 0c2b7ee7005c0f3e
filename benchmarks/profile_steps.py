"""Shows what the steps of an engine consist of: time on the GPU by kernel, gaps between kernels, time of the host.

    python benchmarks/profile_steps.py [--device cuda] [--model qwen3-0.6b] [--num-seqs 256]

Steps that only decode and steps that also compute prompts are measured one after the other: first as they are, for
their duration and the CPU time of the thread that plans them, and then under torch.profiler. One JSON line for each
kind and measurement, and one for each of the kernels that take the most time. A large share of gaps means that the host
is late.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from millrace import LLM
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from models import SHAPES, write_config
from workloads import TEMPERATURE

NUM_DECODE_STEPS, NUM_MIXED_STEPS = 20, 3
WARM_UP_STEPS = 5
NUM_KERNELS = 15
"""Kernels that get a line of their own; one line has the sum of the others."""


@dataclass(slots=True)
class Load:
    """The requests of an engine.

    Attributes:
        llm: The engine.
        prompt_tokens: Length of each prompt.
        count: Number of requests so far.
    """

    llm: LLM
    prompt_tokens: int
    count: int = 0

    def add(self, num_requests: int) -> None:
        """Adds requests that run to the end of the measurements, each with a prompt of its own."""
        params = SamplingParams(temperature=TEMPERATURE, max_tokens=200, ignore_eos=True)
        for _ in range(num_requests):
            prompt = [(self.count * 7 + 13 * i) % 500 for i in range(self.prompt_tokens)]
            self.llm.llm_engine.add_request(GenerateRequest(str(self.count), None, prompt, params))
            self.count += 1

    def step(self, num_steps: int) -> list[tuple[float, float]]:
        """Runs steps; returns the seconds of each one, and those in which this thread used a CPU."""
        seconds = []
        for _ in range(num_steps):
            start, cpu_start = time.perf_counter(), time.thread_time()
            self.llm.llm_engine.step()
            seconds.append((time.perf_counter() - start, time.thread_time() - cpu_start))
        return seconds

    def until_decoding(self) -> None:
        """Runs steps until no request waits and all prompts are computed."""
        while self.llm.stats().num_waiting:
            self.step(1)
        self.step(WARM_UP_STEPS)

    def replace(self, num_requests: int) -> None:
        """Aborts the oldest requests and adds as many, so that the next step computes prompts beside decodes."""
        oldest = self.count - self.llm.stats().num_running
        self.llm.llm_engine.abort(str(i) for i in range(oldest, oldest + num_requests))
        self.add(num_requests)


def profile(options: argparse.Namespace, llm: LLM) -> Iterator[dict[str, Any]]:
    """Yields the lines of decode steps, and then of mixed steps."""
    load = Load(llm, options.prompt_tokens)
    load.add(options.num_seqs)
    load.until_decoding()
    yield {"kind": "decode", **_times(load.step(NUM_DECODE_STEPS))}
    yield from _profiled("decode", load, NUM_DECODE_STEPS, 0, options.device)
    some = max(1, options.num_seqs // 32)
    mixed = []
    for _ in range(NUM_MIXED_STEPS):
        load.replace(some)
        mixed += load.step(1)
    yield {"kind": "mixed", **_times(mixed)}
    yield from _profiled("mixed", load, NUM_MIXED_STEPS, some, options.device)
    if options.device == "cuda":  # Steps of many sizes leave holes in what the allocator has reserved.
        sizes = {"reserved": torch.cuda.memory_reserved(), "allocated": torch.cuda.memory_allocated()}
        yield {"kind": "memory", **{f"{name}_GiB": round(size / 2**30, 2) for name, size in sizes.items()}}


def _times(seconds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    ordered = sorted(step for step, _ in seconds)
    return {
        "steps": len(seconds),
        "step_ms": round(1e3 * sum(ordered) / len(ordered), 3),
        "longest_ms": round(1e3 * ordered[-1], 3),
        "host_cpu_ms": round(1e3 * sum(cpu for _, cpu in seconds) / len(seconds), 3),
    }


def _profiled(kind: str, load: Load, num_steps: int, num_replaced: int, device: str) -> Iterator[dict[str, Any]]:
    """Yields the line of the profiled steps, and those of their kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(num_steps):
            if num_replaced:
                load.replace(num_replaced)
            load.step(1)
        if device == "cuda":
            torch.cuda.synchronize()
    spans = [Span(event.name, event.time_range.start, event.time_range.end) for event in _kernels(profiler, device)]
    if not spans:
        yield {"kind": kind, "profiled": False, "failed": "the profiler saw no kernel"}
        return
    yield {"kind": kind, "profiled": True, **gaps(spans, num_steps)}
    yield from ({"kind": kind, **line} for line in by_name(spans, num_steps))


def _kernels(profiler: torch.profiler.profile, device: str) -> list[Any]:
    """Returns the events of a GPU, or on a CPU those of the operators that no other operator has called."""
    events = profiler.events() or []
    if device == "cuda":
        return [event for event in events if event.device_type.name == "CUDA"]
    return [event for event in events if event.cpu_parent is None]


@dataclass(frozen=True, slots=True)
class Span:
    """One run of a kernel: its name, and start and end in microseconds."""

    name: str
    start: float
    end: float


def gaps(spans: Sequence[Span], num_steps: int) -> dict[str, Any]:
    """Returns the time of a step in which a kernel runs, and the time in which none does."""
    ordered = sorted(spans, key=lambda span: span.start)
    busy, end, largest = 0.0, ordered[0].start, 0.0
    for span in ordered:
        largest = max(largest, span.start - end)
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    whole = end - ordered[0].start
    return {
        "kernels_per_step": round(len(spans) / num_steps, 1),
        "busy_ms": round(busy / num_steps / 1e3, 3),
        "gaps_ms": round((whole - busy) / num_steps / 1e3, 3),
        "largest_gap_ms": round(largest / 1e3, 3),
        "busy_share": round(busy / whole, 4) if whole else 1.0,
    }


def by_name(spans: Sequence[Span], num_steps: int) -> Iterator[dict[str, Any]]:
    """Yields the number and time of each kernel's runs in a step: those that take the most time, and all others."""
    sums: dict[str, tuple[int, float]] = {}
    for span in spans:
        count, total = sums.get(span.name, (0, 0.0))
        sums[span.name] = count + 1, total + span.end - span.start
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    largest, others = ordered[:NUM_KERNELS], ordered[NUM_KERNELS:]
    if others:
        largest.append(("all others", (sum(n for _, (n, _) in others), sum(total for _, (_, total) in others))))
    for name, (count, total) in largest:
        per_step = {"runs_per_step": round(count / num_steps, 1), "us_per_step": round(total / num_steps, 1)}
        yield {"kernel": name[:100], **per_step}


def open_llm(folder: Path, model: str, options: argparse.Namespace) -> LLM:
    """Opens an engine with random weights and the sizes of offline.py."""
    write_config(folder, SHAPES[model])
    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16" if options.device == "cuda" else "float32",
        device=options.device,
        max_model_len=options.prompt_tokens + 256,
        max_num_seqs=options.num_seqs,
        max_num_batched_tokens=16_384,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        enforce_eager=options.enforce_eager,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; the defaults follow from the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", nargs="+", dest="models", choices=list(SHAPES), help="models, one after the other")
    parser.add_argument("--num-seqs", type=int, help="256 on a GPU, 4 on a CPU, if not given")
    parser.add_argument("--prompt-tokens", type=int, help="of each prompt; 512 on a GPU, 16 on a CPU, if not given")
    parser.add_argument("--quantization", choices=["fp8", "int8"])
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--enforce-eager", action="store_true")
    options = parser.parse_args(arguments)
    is_cuda = options.device == "cuda"
    options.models = options.models or ["qwen3-0.6b" if is_cuda else "tiny"]
    options.num_seqs = options.num_seqs or (256 if is_cuda else 4)
    options.prompt_tokens = options.prompt_tokens or (512 if is_cuda else 16)
    return options


def main() -> int:
    """Prints the lines of all models; returns 1 if a profile is empty."""
    options = parse()
    is_wrong = False
    for model in options.models:
        with tempfile.TemporaryDirectory() as name, open_llm(Path(name), model, options) as llm:
            for line in profile(options, llm):
                is_wrong |= "failed" in line
                benchmark = "kernels of steps" if "kernel" in line else "steps of an engine"
                print(json.dumps({"benchmark": benchmark, "model": model, **line}), flush=True)
    if is_wrong:
        print("the profiler saw no kernels", file=sys.stderr)
    return int(is_wrong)


if __name__ == "__main__":
    raise SystemExit(main())
