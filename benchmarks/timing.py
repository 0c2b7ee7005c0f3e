"""Times calls on the host or on a GPU, several variants in turn.

On a GPU the calls of a variant are captured into one graph and replayed, so that the device's work is timed
and not the launches. Calls that work on different copies of the same inputs keep these inputs out of the cache.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

MIN_CALLS_PER_REPLAY = 8
"""Fewest calls of a replay, because one short kernel takes less time than the resolution of the clock."""

Call = Callable[[], Any]


def time_calls(variants: Mapping[str, Sequence[Call]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of one call of each variant, `repeats` times.

    Variants take turns, so that a change of the machine's clock affects all of them.

    Args:
        variants: Name -> calls that do the same work; they run round robin.
        device: Device on which they run.
        repeats: Measurements per variant.
    """
    prepare = _prepare_cuda if device.type == "cuda" else _prepare_cpu
    measure = {name: prepare(calls) for name, calls in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in measure.items():
            seconds[name].append(run())
    return seconds


def _prepare_cpu(calls: Sequence[Call]) -> Callable[[], float]:
    calls[0]()
    in_turn = itertools.cycle(calls)

    def run() -> float:
        call = next(in_turn)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def _prepare_cuda(calls: Sequence[Call]) -> Callable[[], float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # This call compiles, and lets libraries allocate their buffers.
        for call in calls:
            call()
    side.synchronize()
    rounds = -(-MIN_CALLS_PER_REPLAY // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / (rounds * len(calls))

    return run
