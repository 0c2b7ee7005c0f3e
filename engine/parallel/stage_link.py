"""`ChannelLink`: passes hidden states between the CPU ranks of neighbouring pp stages."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import EngineDeadError
from .channel import Channel

__all__ = ["ChannelLink"]


SMALL_BYTES = 64 << 10
"""Bytes that a connection buffers even if the other end does not read: a decode step of a few sequences."""


class ChannelLink:
    """A `StageLink` over TCP, for a chain of ranks with one rank of each pp stage.

    A thread sends large tensors, so that a pp stage can begin its next step while the next pp stage still computes the
    previous one. Small tensors are sent directly, because waking the thread would take longer.

    Args:
        to_next: Channel to the next pp stage; None in the last.
        from_previous: Channel from the previous pp stage; None in the first.
    """

    def __init__(self, to_next: Channel | None, from_previous: Channel | None) -> None:
        self._to_next, self._from_previous = to_next, from_previous
        self._queue: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._num_queued = self._num_sent = 0
        self._error: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._send_all, name="millrace-stage", daemon=True)
        if to_next is not None:
            self._thread.start()

    def send(self, tensor: Tensor) -> None:
        """Sends a tensor, which must not be changed afterwards.

        Raises:
            EngineDeadError: The next pp stage has ended.
        """
        assert self._to_next is not None
        if self._error is not None:
            raise self._error
        tensor = tensor.contiguous()
        if tensor.nbytes <= SMALL_BYTES and self._num_sent == self._num_queued:
            self._to_next.send_bytes_of(_memory(tensor))
            return
        self._num_queued += 1
        self._queue.put(tensor)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Waits for the next tensor from the previous pp stage.

        Raises:
            EngineDeadError: The previous pp stage has ended.
        """
        assert self._from_previous is not None
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        self._from_previous.receive_bytes_into(_memory(tensor))
        return tensor

    def close(self) -> None:
        """Closes the connections and ends the thread."""
        self._queue.put(None)
        for channel in (self._to_next, self._from_previous):
            if channel is not None:
                channel.close()

    def _send_all(self) -> None:
        assert self._to_next is not None
        while (tensor := self._queue.get()) is not None:
            try:
                self._to_next.send_bytes_of(_memory(tensor))
                self._num_sent += 1
            except EngineDeadError as error:
                self._error = error
                return


def _memory(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor of any dtype."""
    return tensor.view(-1).view(torch.uint8).numpy().data
