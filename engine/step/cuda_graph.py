"""Recorded decode steps: what a model launches for one token of each sequence, replayed as one launch.

A decode step launches hundreds of small kernels, and for small models the host takes longer to launch them than the
device to run them. A CUDA graph is the recording of such a sequence with all its addresses, so it serves one size: a
step is padded to the next size of a ladder. A graph is recorded when its size first occurs.

Recorded is all from the tables to the hidden states. The logits are left out: they are one product more to launch, and
every recording would keep its own [size, vocab_size] of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CudaGraphs", "DecodeGraphs", "GraphBackend", "graph_sizes"]

LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Sizes of which padding takes less than half up to 16, less than a third up to 128 and less than a fifth above."""

STEP = 64
"""Between the sizes above the ladder."""


def graph_sizes(max_num_seqs: int, asked: Sequence[int] | None = None) -> list[int]:
    """Returns the numbers of sequences to record decode steps for.

    Args:
        max_num_seqs: Most sequences of a step; the largest size of the ladder.
        asked: To use instead of the ladder; sizes above `max_num_seqs` are dropped.
    """
    if asked is not None:
        return sorted({size for size in asked if size <= max_num_seqs})
    sizes = [*LADDER, *range(LADDER[-1] + STEP, max_num_seqs, STEP)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class GraphBackend(Protocol):
    """Records what a function does on the device."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Runs a function once, then records it.

        Args:
            function: Reads and writes the same memory whenever it is called, and does nothing on the host.

        Returns:
            A function that does the same again; its result lasts until the next call.
        """
        ...


class CudaGraphs:
    """Records CUDA graphs, which share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Runs a function once, so that kernels are compiled and libraries have their workspaces, then records it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a caller's, may use CUDA meanwhile: only this one is held to what can be recorded.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True, slots=True)
class Recording:
    """A decode step of one size.

    Attributes:
        sequences: `[4, size]` int32, where it reads the plan.
        num_shared: `[1]` int32, where it reads the number of shared blocks; None if it reads none.
        replay: Runs it and returns the hidden states.
    """

    sequences: Tensor
    num_shared: Tensor | None
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """Runs decode steps from recordings.

    Args:
        run: Runs a decode step: takes the plan and the number of shared blocks (or None), returns the hidden states.
        sizes: Numbers of sequences to record, ascending.
        backend: Records them.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor | None], Tensor], sizes: Sequence[int], backend: GraphBackend
    ) -> None:
        self._run = run
        self._sizes = sizes
        self._backend = backend
        self._recordings: dict[tuple[int, bool], Recording] = {}

    def padded_size(self, num_seqs: int) -> int | None:
        """Returns the smallest size that holds so many sequences; None if none does."""
        index = bisect_left(self._sizes, num_seqs)
        return self._sizes[index] if index < len(self._sizes) else None

    def run(self, sequences: Tensor, num_shared: Tensor | None) -> Tensor:
        """Runs a step.

        Args:
            sequences: `[4, size]` int32, padded to one of the sizes.
            num_shared: `[1]` int32, leading blocks that all sequences have in common; None if too few to matter.

        Returns:
            Hidden states, `[size, hidden_size]`; the next step overwrites them.
        """
        key = (sequences.shape[1], num_shared is not None)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(sequences, num_shared)
        recording.sequences.copy_(sequences)
        if recording.num_shared is not None and num_shared is not None:
            recording.num_shared.copy_(num_shared)
        return recording.replay()

    def _record(self, sequences: Tensor, num_shared: Tensor | None) -> Recording:
        """Records a step on memory of its own, which starts as a copy of what this step brings."""
        own, own_shared = sequences.clone(), None if num_shared is None else num_shared.clone()
        return Recording(own, own_shared, self._backend.record(lambda: self._run(own, own_shared)))
