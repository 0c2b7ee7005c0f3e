"""`DecodeGraphs`: decode steps on a GPU, recorded as CUDA graphs and replayed with one launch each.

A decode step launches hundreds of small kernels, and for small models the host takes longer to launch the kernels than
the device takes to run them. A CUDA graph records these launches with all their addresses, so one graph serves one
number of sequences: a step is padded to the next recorded size. All sizes are recorded before the first request. A size
that cannot be recorded is launched kernel by kernel, on all ranks if one of them cannot record it.

A step is recorded in two parts. The first one goes from the tables to the hidden states. The second one, the draw,
computes the logits, draws a token for each sequence and appends it to the tables. Only steps whose sequences ask for
nothing but a draw use the second part; what others ask for (log-probabilities, edits of logits, token masks) depends on
the step, so its kernels are launched.

All recordings use one pool of memory. Tensors that live within a recording, such as the logits, share their memory with
those of all other recordings; only the tensors that a recording returns have memory of their own.
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

from ..lora.routing import no_routing
from .head import Draw, RunDecode
from .tables import padding_plan

logger = logging.getLogger(__name__)

__all__ = ["CudaGraphs", "DecodeGraphs", "GraphBackend", "graph_sizes"]

LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
"""Recorded sizes. Padding is less than half of a step up to size 16, less than a third up to 128, else a fifth."""

STEP = 256
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
    """The recorded work of a function for arguments of some shapes.

    Attributes:
        inputs: The memory from which the work reads the arguments; None for an argument that is None.
        replay: Runs the work and returns the result of the function.
    """

    inputs: tuple[Tensor | None, ...]
    replay: Callable[[], Tensor]


class RecordedFunction:
    """A function of tensors that is recorded once for arguments of the same shapes, and then replayed.

    Args:
        name: What the function does, for messages.
        function: Takes tensors, or None for some of them. Its work depends only on their shapes and contents.
        backend: Makes the recordings.
        agree: Returns whether all ranks of the engine have called it with True; None for an engine of one rank.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Tensor],
        backend: GraphBackend,
        agree: Callable[[bool], bool] | None = None,
    ) -> None:
        self._name = name
        self._function = function
        self._backend = backend
        self._agree = agree
        self._recordings: dict[tuple[torch.Size | None, ...], Recording | None] = {}
        """Recordings by the shapes of the arguments; None where the function could not be recorded."""

    def __call__(self, *given: Tensor | None) -> Tensor:
        """Replays the function, or launches it kernel by kernel if it could not be recorded.

        Returns:
            The result of the function; the next call with arguments of these shapes overwrites it.
        """
        recording = self.find(*given)
        if recording is None:
            return self._function(*given)
        for own, argument in zip(recording.inputs, given, strict=True):
            if own is not None and argument is not None:
                own.copy_(argument)
        return recording.replay()

    def find(self, *given: Tensor | None) -> Recording | None:
        """Returns the recording for arguments like these, made if there is none yet; None if it cannot be made."""
        key = tuple(None if argument is None else argument.shape for argument in given)
        if key not in self._recordings:
            self._recordings[key] = self._record(given)
        return self._recordings[key]

    def close(self) -> None:
        """Frees the recordings."""
        self._recordings.clear()

    def _record(self, given: Sequence[Tensor | None]) -> Recording | None:
        """Records the function, which reads its arguments from copies that later calls overwrite with their own."""
        inputs = tuple(None if argument is None else argument.clone() for argument in given)
        work = functools.partial(self._function, *inputs)
        if self._agree is not None:
            # The sums of this call wait for all ranks, so an error in it must end the engine. A recording begins with
            # the host waiting for the device, and so it must not begin before all ranks have queued their sums.
            self._backend.warm_up(work)
            self._agree(True)
        replay, reason = None, "another rank could not record them"
        try:
            if self._agree is None:
                self._backend.warm_up(work)
            replay = self._backend.record(work)
        except Exception as error:  # noqa: BLE001  # Memory may be short, or a library may call what cannot be recorded.
            reason = f"{type(error).__name__}: {error}"
        can_replay = replay is not None if self._agree is None else self._agree(replay is not None)
        if replay is not None and can_replay:
            return Recording(inputs, replay)
        shapes = ", ".join(str(list(argument.shape)) for argument in given if argument is not None)
        logger.warning(
            "%s with arguments %s could not be recorded and are launched kernel by kernel, which takes the host "
            "longer: %s",
            self._name,
            shapes,
            reason,
        )
        return None


class DecodeGraphs:
    """Runs decode steps from recordings: for each size with and without shared blocks and adapters, and for the draw.

    Args:
        run: Runs a decode step.
        sizes: Numbers of sequences for which steps are recorded, ascending.
        backend: Makes the recordings.
        agree: Returns whether all ranks of the engine have called it with True; None for an engine of one rank.
        draw: Draws the tokens of a decode step: takes its hidden states and its plan, returns token ids. None if the
            draw is not recorded.
    """

    def __init__(
        self,
        run: RunDecode,
        sizes: Sequence[int],
        backend: GraphBackend,
        agree: Callable[[bool], bool] | None = None,
        draw: Draw | None = None,
    ) -> None:
        self._sizes = sizes
        self._backend = backend
        self._steps = RecordedFunction("decode steps", run, backend, agree)
        self._draws = None if draw is None else RecordedFunction("draws", draw, backend, agree)

    @property
    def draw(self) -> Draw | None:
        """The recorded draw, whose result the next one of the same size overwrites; None if it is not recorded."""
        return self._draws

    def padded_size(self, num_seqs: int) -> int | None:
        """Returns the smallest recorded size that is at least `num_seqs`; None if all recorded sizes are smaller."""
        index = bisect_left(self._sizes, num_seqs)
        return self._sizes[index] if index < len(self._sizes) else None

    @torch.inference_mode()
    def record_all(self, device: torch.device, with_shared: bool, num_slots: int | None = None) -> None:
        """Records the steps of all sizes, from plans of padding alone.

        The largest size comes first, because the memory that it takes from the common pool then serves all others.

        Args:
            device: Device of the steps.
            with_shared: Whether steps with shared blocks are recorded too.
            num_slots: Number of adapter slots, of an engine that records steps with adapters too.
        """
        for size in reversed(self._sizes):
            plan = padding_plan(size, device)
            routings = [None] if num_slots is None else [None, no_routing(num_slots, size, device)]
            for num_shared in (None, torch.zeros(1, dtype=torch.int32, device=device))[: 1 + with_shared]:
                for routing in routings:
                    self._steps.find(plan, num_shared, routing)
            if self._draws is not None:
                self._draws.find(self.run(plan, None), plan)

    def run(self, sequences: Tensor, num_shared: Tensor | None, routing: Tensor | None = None) -> Tensor:
        """Runs a decode step from its recording, or kernel by kernel if it could not be recorded.

        Args:
            sequences: `[4, size]` int32, the `plan` argument of `kernels.gather_batch`, padded to a recorded size.
            num_shared: `[1]` int32, number of leading blocks that all sequences share; None if attention reads the
                blocks of each sequence separately.
            routing: `Routing.packed`, padded to the size; None if no sequence has an adapter.

        Returns:
            Hidden states, `[size, hidden_size]`; the next step overwrites them.
        """
        return self._steps(sequences, num_shared, routing)

    def close(self) -> None:
        """Frees the recordings. It must come before the end of the sums in them: NCCL waits until they are freed."""
        self._steps.close()
        if self._draws is not None:
            self._draws.close()
        self._backend.close()
