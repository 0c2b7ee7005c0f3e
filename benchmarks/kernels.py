"""Times the CPU implementation of each kernel against its plain torch body.

    python benchmarks/kernels.py [--threads 2] [--repeats 15] [--only paged_attention]

One JSON line per case: the median of interleaved calls of each, and what the implementation reaches in GB/s (bytes that
must be moved) or GFLOP/s (multiplications and additions that must be done), whichever bounds the case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from millrace.kernels._op import Draw, all_ops
from millrace.kernels.paged_attention.samples import Geometry, make_sample


@dataclass(frozen=True, slots=True)
class Case:
    """A call to time, and the work in it: `unit` is "GB" or "GFLOP", `work` is in that unit."""

    op: str
    name: str
    args: tuple[Any, ...]
    work: float
    unit: str


def cases() -> Iterator[Case]:
    """Yields every case."""
    yield from attention_cases()
    yield from sample_cases()
    for dtype in (torch.float32, torch.bfloat16):
        draw, name = Draw.seeded(dtype), str(dtype).removeprefix("torch.")
        qkv = draw.normal(64, 32, 128)
        table = draw.normal(4096, 128, dtype=torch.float32)
        args = (draw.integers(0, 4096, 64), qkv[:, :16], qkv[:, 16:24], table)
        yield Case("rotary", f"64 tokens, 16+8 heads of 128 {name}", args, gigabytes(qkv) * 1.5, "GB")


def attention_cases() -> Iterator[Case]:
    """Yields decode steps, prompts and a chunk, for a small model and one of ordinary heads."""
    shapes = [
        ("decode 32 x 512", torch.bfloat16, Geometry(16, 8, 128, 16), [(512, 1)] * 32),
        ("decode 32 x 512", torch.float32, Geometry(16, 8, 128, 16), [(512, 1)] * 32),
        ("decode 64 x 100, small model", torch.float32, Geometry(6, 2, 32, 16), [(100, 1)] * 64),
        ("prefill 64 x 40, small model", torch.float32, Geometry(6, 6, 32, 16), [(40, 40)] * 64),
        ("prefill 512", torch.bfloat16, Geometry(16, 8, 128, 16), [(512, 512)]),
        ("prefill 512", torch.float32, Geometry(16, 8, 128, 16), [(512, 512)]),
        ("chunk of 64 at 1024", torch.bfloat16, Geometry(16, 8, 128, 16), [(1024, 64)]),
    ]
    for name, dtype, geometry, lengths in shapes:
        args = make_sample("", Draw.seeded(dtype), geometry, lengths).args
        pairs = sum(queries * (seq_len - (queries - 1) / 2) for seq_len, queries in lengths)
        work, unit = pairs * geometry.num_heads * geometry.head_dim * 4 / 1e9, "GFLOP"
        if all(queries == 1 for _, queries in lengths):
            tokens = sum(seq_len for seq_len, _ in lengths)
            work, unit = 2 * tokens * geometry.num_kv_heads * geometry.head_dim * dtype.itemsize / 1e9, "GB"
        yield Case("paged_attention", f"{name} {str(dtype).removeprefix('torch.')}", args, work, unit)


def sample_cases() -> Iterator[Case]:
    """Yields every kind of filter over a large vocabulary."""
    filters = {
        "greedy": (0.0, 0, 1.0, 0.0),
        "plain draw": (1.0, 0, 1.0, 0.0),
        "top_k 20, top_p 0.8": (0.7, 20, 0.8, 0.0),
        "top_p 0.9": (1.0, 0, 0.9, 0.0),
        "min_p 0.05": (1.0, 0, 1.0, 0.05),
    }
    draw, num_rows = Draw.seeded(torch.float32), 8
    logits = draw.normal(num_rows, 151_936) * 3
    rows = torch.arange(num_rows)
    for name, (temperature, top_k, top_p, min_p) in filters.items():
        args = (
            logits,
            torch.full((num_rows,), temperature),
            torch.full((num_rows,), top_k, dtype=torch.int32),
            torch.full((num_rows,), top_p),
            torch.full((num_rows,), min_p),
            rows,
            rows,
        )
        yield Case("sample", f"{num_rows} x 151936, {name}", args, gigabytes(logits), "GB")


def gigabytes(tensor: torch.Tensor) -> float:
    """Returns the size of a tensor in GB."""
    return tensor.numel() * tensor.element_size() / 1e9


def timed(function: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """Returns how long one call takes, in seconds."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Runs both bodies in turn, after one call each that is not counted."""
    op = all_ops()[case.op]
    functions = {"plain": op.plain, "cpu": op.implementations()["cpu"]}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            seconds = timed(function, case.args)
            if repeat:
                times[name].append(seconds)
    plain_s, cpu_s = (statistics.median(times[name]) for name in functions)
    return {
        "op": case.op,
        "case": case.name,
        "num_threads": torch.get_num_threads(),
        "plain_ms": round(plain_s * 1e3, 4),
        "cpu_ms": round(cpu_s * 1e3, 4),
        "speedup": round(plain_s / cpu_s, 2),
        f"{case.unit}_per_s": round(case.work / cpu_s, 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", help="the name of one op")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for case in cases():
        if options.only in (None, case.op):
            print(json.dumps(measure(case, options.repeats)), flush=True)
