"""`DecodeTape`: decode steps on a CPU, recorded as a list of kernels that one call runs for any number of sequences.

This is the counterpart of `cuda_graph`. The recording of the largest step serves all smaller ones, so no step is
padded. Making the recording computes nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.tape import NotRecordableError, Tape, record
from .head import Draw, RunDecode

__all__ = ["DecodeTape"]

logger = logging.getLogger(__name__)

MAX_ROWS = 256
"""Most sequences of a recorded step. In larger steps the time between kernels is too small a share to matter."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded decode step.

    Attributes:
        sequences: `[4, max_num_seqs]` int32, the memory from which the recorded step reads the plan.
        num_shared: `[1]` int32, the memory from which the recorded step reads the number of shared blocks; None for a
            step without shared blocks.
        routing: The memory from which the recorded step reads `Routing.packed`; None for a step without adapters.
        tape: The recorded kernels.
        hidden: `[max_num_seqs, hidden_size]`, the memory to which the step writes the hidden states.
    """

    sequences: Tensor
    num_shared: Tensor | None
    routing: Tensor | None
    tape: Tape
    hidden: Tensor


class DecodeTape:
    """Runs decode steps from recordings, if the model consists of compiled kernels alone; else kernel by kernel.

    Args:
        run: Runs a decode step: takes the plan, the number of shared blocks (or None) and the routing of adapters (or
            None), returns the hidden states.
        max_num_seqs: Most sequences of a step.
    """

    draw: Draw | None = None
    """Draws are not recorded: a tape takes compiled kernels alone, and those of a draw are not among them."""

    def __init__(self, run: RunDecode, max_num_seqs: int) -> None:
        self._run = run
        self._max_num_seqs = min(max_num_seqs, MAX_ROWS)
        self._recordings: dict[tuple[bool, bool], Recording] = {}
        self._is_recordable = True

    def padded_size(self, num_seqs: int) -> int | None:
        """Returns `num_seqs`, as no padding is needed; None if steps of this size are not run from a recording."""
        return num_seqs if self._is_recordable and num_seqs <= self._max_num_seqs else None

    def run(self, sequences: Tensor, num_shared: Tensor | None, routing: Tensor | None) -> Tensor:
        """Runs a decode step from one of four recordings, with or without shared blocks, and with or without adapters.

        Each recording is made at its first use.

        Args:
            sequences: `[4, num_seqs]` int32, the `plan` argument of `kernels.gather_batch`.
            num_shared: `[1]` int32, number of leading blocks that all sequences share; None if attention reads the
                blocks of each sequence separately.
            routing: `Routing.packed`; None if no sequence has an adapter.

        Returns:
            Hidden states, `[num_seqs, hidden_size]`; the next step overwrites them.
        """
        key = (num_shared is not None, routing is not None)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._record(num_shared is not None, routing, sequences.shape[1])
        if recording is None:
            return self._run(sequences, num_shared, routing)
        num_seqs = sequences.shape[1]
        recording.sequences[:, :num_seqs].copy_(sequences)
        if recording.num_shared is not None and num_shared is not None:
            recording.num_shared.copy_(num_shared)
        if recording.routing is not None and routing is not None:
            recording.routing[: len(routing)].copy_(routing)
        recording.tape.run(num_seqs)
        return recording.hidden[:num_seqs]

    def close(self) -> None:
        """Frees the recordings."""
        self._recordings.clear()

    def _record(self, shares: bool, routing: Tensor | None, num_seqs: int) -> Recording | None:
        """Records a decode step of the most sequences, with shared blocks if `shares`; None if that is not possible.

        Args:
            shares: Whether the step has shared blocks.
            routing: The routing of a step of `num_seqs` sequences; None for a step without adapters.
            num_seqs: Number of sequences of that step.
        """
        widest = None if routing is None else routing.new_zeros(len(routing) - num_seqs + self._max_num_seqs)
        sequences = torch.zeros((4, self._max_num_seqs), dtype=torch.int32)
        num_shared = torch.zeros(1, dtype=torch.int32) if shares else None
        try:
            tape, hidden = record(lambda: self._run(sequences, num_shared, widest))
        except NotRecordableError as error:
            logger.info("decode steps are not recorded: %s", error)
            self._is_recordable = False
            return None
        recording = Recording(sequences, num_shared, widest, tape, hidden)
        self._recordings[(shares, routing is not None)] = recording
        return recording
