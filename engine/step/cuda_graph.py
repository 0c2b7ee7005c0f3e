"""`DecodeGraphs`: decode steps on a GPU, recorded as CUDA graphs and replayed with one launch each.

A decode step launches hundreds of small kernels, and for small models the host takes longer to launch the kernels than
the device takes to run them. A CUDA graph records these launches with all their addresses, so one graph serves one
number of sequences: a step is padded to the next recorded size. All sizes are recorded before the first request. A size
that cannot be recorded is launched kernel by kernel, on all ranks if one of them cannot record it.

A recording covers the work from the tables to the hidden states. It does not cover the logits: computing them is only
one more launch, and every recording would keep a `[size, vocab_size]` tensor for them.
"""

from __future__ import annotations

import functools
import gc
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .tables import padding_plan

logger = logging.getLogger(__name__)

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

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        """Runs a function once, as `record` needs it: this compiles kernels and allocates workspaces of libraries."""
        ...

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Records a function that has run once; nothing of it runs now.

        Args:
            function: A function that reads and writes the same memory in every call, and has no effect on the host.

        Returns:
            A function that repeats the recorded work and returns its result, which the next call overwrites.
        """
        ...

    def close(self) -> None:
        """Frees all recordings, which are not repeated afterwards."""
        ...


class CudaGraphs:
    """Records CUDA graphs. All graphs share one pool of memory, because only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        """As `GraphBackend.warm_up`; on the stream of the recordings, to which the workspaces belong."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """As `GraphBackend.record`; the host first waits for the device."""
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        # Other threads may use CUDA meanwhile, so only the calls of this thread are restricted to recordable ones.
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with without_garbage_collection(), recording:
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def close(self) -> None:
        """As `GraphBackend.close`; also frees graphs that the traceback of an error still refers to."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keeps Python from collecting garbage in the block, because CUDA objects may not be destroyed in a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
    """Runs decode steps from recordings: one for each size, and with shared blocks another one.

    Args:
        run: Runs a decode step: takes the plan and the number of shared blocks (or None), returns the hidden states.
        sizes: Numbers of sequences for which steps are recorded, ascending.
        backend: Makes the recordings.
        agree: Returns whether all ranks of the engine have called it with True; None for an engine of one rank.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Tensor | None], Tensor],
        sizes: Sequence[int],
        backend: GraphBackend,
        agree: Callable[[bool], bool] | None = None,
    ) -> None:
        self._run = run
        self._sizes = sizes
        self._backend = backend
        self._agree = agree
        self._recordings: dict[tuple[int, bool], Recording | None] = {}
        """Recordings by size and whether blocks are shared; None for a step that could not be recorded."""

    def padded_size(self, num_seqs: int) -> int | None:
        """Returns the smallest recorded size that is at least `num_seqs`; None if all recorded sizes are smaller."""
        index = bisect_left(self._sizes, num_seqs)
        return self._sizes[index] if index < len(self._sizes) else None

    @torch.inference_mode()
    def record_all(self, device: torch.device, with_shared: bool) -> None:
        """Records the steps of all sizes, from plans of padding alone.

        The largest size comes first, because the memory that it takes from the common pool then serves all others.

        Args:
            device: Device of the steps.
            with_shared: Whether steps with shared blocks are recorded too.
        """
        for size in reversed(self._sizes):
            for num_shared in (None, torch.zeros(1, dtype=torch.int32, device=device))[: 1 + with_shared]:
                self._find(padding_plan(size, device), num_shared)

    def run(self, sequences: Tensor, num_shared: Tensor | None) -> Tensor:
        """Runs a decode step from its recording, or kernel by kernel if it could not be recorded.

        Args:
            sequences: `[4, size]` int32, the `plan` argument of `kernels.gather_batch`, padded to a recorded size.
            num_shared: `[1]` int32, number of leading blocks that all sequences share; None if attention reads the
                blocks of each sequence separately.

        Returns:
            Hidden states, `[size, hidden_size]`; the next step overwrites them.
        """
        recording = self._find(sequences, num_shared)
        if recording is None:
            return self._run(sequences, num_shared)
        recording.sequences.copy_(sequences)
        if recording.num_shared is not None and num_shared is not None:
            recording.num_shared.copy_(num_shared)
        return recording.replay()

    def close(self) -> None:
        """Frees the recordings. It must come before the end of the sums in them: NCCL waits until they are freed."""
        self._recordings.clear()
        self._backend.close()

    def _find(self, sequences: Tensor, num_shared: Tensor | None) -> Recording | None:
        """Returns the recording of steps like this one, made if there is none yet; None if it cannot be made."""
        key = (sequences.shape[1], num_shared is not None)
        if key not in self._recordings:
            self._recordings[key] = self._record(sequences, num_shared)
        return self._recordings[key]

    def _record(self, sequences: Tensor, num_shared: Tensor | None) -> Recording | None:
        """Records a step that reads its arguments from copies, which later steps overwrite with their own arguments."""
        own, own_shared = sequences.clone(), None if num_shared is None else num_shared.clone()
        step = functools.partial(self._run, own, own_shared)
        if self._agree is not None:
            # The sums of this step wait for all ranks, so an error in it must end the engine. A recording begins with
            # the host waiting for the device, and so it must not begin before all ranks have queued their sums.
            self._backend.warm_up(step)
            self._agree(True)
        replay, reason = None, "another rank could not record them"
        try:
            if self._agree is None:
                self._backend.warm_up(step)
            replay = self._backend.record(step)
        except Exception as error:  # noqa: BLE001  # Memory may be short, or a library may call what cannot be recorded.
            reason = f"{type(error).__name__}: {error}"
        can_replay = replay is not None if self._agree is None else self._agree(replay is not None)
        if replay is not None and can_replay:
            return Recording(own, own_shared, replay)
        logger.warning(
            "decode steps of %d sequences could not be recorded and are launched kernel by kernel, which takes the "
            "host longer: %s",
            sequences.shape[1],
            reason,
        )
        return None
