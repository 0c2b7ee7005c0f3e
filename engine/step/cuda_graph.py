"""`DecodeGraphs`: decode steps on a GPU, recorded as CUDA graphs and replayed with one launch each.

A decode step launches hundreds of small kernels, and for small models the host takes longer to launch the kernels than
the device takes to run them. A CUDA graph records these launches with all their addresses, so one graph serves one
number of sequences: a step is padded to the next recorded size. A graph is recorded when its size first occurs.

A recording covers the work from the tables to the hidden states. It does not cover the logits: computing them is only
one more launch, and every recording would keep a `[size, vocab_size]` tensor for them.
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
"""Recorded sizes. Padding is less than half of a step up to size 16, less than a third up to 128, else a fifth."""

STEP = 64
"""Difference between two neighbouring sizes above the ladder."""


def graph_sizes(max_num_seqs: int, asked: Sequence[int] | None = None) -> list[int]:
    """Returns the numbers of sequences for which decode steps are recorded, ascending.

    Args:
        max_num_seqs: Most sequences of a step; without `asked`, this is the largest size.
        asked: Sizes that the user chose in place of the default ones (`LADDER`); sizes above `max_num_seqs` are
            dropped.
    """
    if asked is not None:
        return sorted({size for size in asked if size <= max_num_seqs})
    sizes = [*LADDER, *range(LADDER[-1] + STEP, max_num_seqs, STEP)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class GraphBackend(Protocol):
    """Records the work that a function launches on the device."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Runs a function once, then records it.

        Args:
            function: A function that reads and writes the same memory in every call, and has no effect on the host.

        Returns:
            A function that repeats the recorded work and returns its result, which the next call overwrites.
        """
        ...


class CudaGraphs:
    """Records CUDA graphs. All graphs share one pool of memory, because only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """As `GraphBackend.record`; the first run compiles kernels and allocates the workspaces of libraries."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile, so only the calls of this thread are restricted to recordable ones.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded decode step of one size.

    Attributes:
        sequences: `[4, size]` int32, the memory from which the recorded step reads the plan.
        num_shared: `[1]` int32, the memory from which the recorded step reads the number of shared blocks; None for a
            step without shared blocks.
        replay: Runs the recorded step and returns the hidden states.
    """

    sequences: Tensor
    num_shared: Tensor | None
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """Runs decode steps from recordings, of which it makes one for each size, with and without shared blocks.

    Args:
        run: Runs a decode step: takes the plan and the number of shared blocks (or None), returns the hidden states.
        sizes: Numbers of sequences for which steps are recorded, ascending.
        backend: Makes the recordings.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor | None], Tensor], sizes: Sequence[int], backend: GraphBackend
    ) -> None:
        self._run = run
        self._sizes = sizes
        self._backend = backend
        self._recordings: dict[tuple[int, bool], Recording] = {}

    def padded_size(self, num_seqs: int) -> int | None:
        """Returns the smallest recorded size that is at least `num_seqs`; None if all recorded sizes are smaller."""
        index = bisect_left(self._sizes, num_seqs)
        return self._sizes[index] if index < len(self._sizes) else None

    def run(self, sequences: Tensor, num_shared: Tensor | None) -> Tensor:
        """Runs a decode step from its recording, which is made when a size first occurs.

        Args:
            sequences: `[4, size]` int32, the `plan` argument of `kernels.gather_batch`, padded to a recorded size.
            num_shared: `[1]` int32, number of leading blocks that all sequences share; None if attention reads the
                blocks of each sequence separately.

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
        """Records a step that reads its arguments from copies, which later steps overwrite with their own arguments."""
        own, own_shared = sequences.clone(), None if num_shared is None else num_shared.clone()
        return Recording(own, own_shared, self._backend.record(lambda: self._run(own, own_shared)))
