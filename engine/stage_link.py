"""Hidden states from stage to stage between CPUs: a connection for each rank to its like in the next stage."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .channel import Channel
from .errors import EngineDeadError

__all__ = ["ChannelLink"]


class ChannelLink:
    """A chain of ranks, one of each stage, as `parallel.StageLink`.

    A thread sends, so that a stage can begin its next step while the next stage is still busy with the last one.

    Args:
        to_next: To the next stage; None in the last.
        from_previous: From the stage before; None in the first.
    """

    def __init__(self, to_next: Channel | None, from_previous: Channel | None) -> None:
        self._to_next, self._from_previous = to_next, from_previous
        self._queue: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._error: EngineDeadError | None = None
        if to_next is not None:
            threading.Thread(target=self._send_all, args=(to_next,), name="millrace-stage", daemon=True).start()

    def send(self, tensor: Tensor) -> None:
        """Hands a tensor to the thread; it must not be changed afterwards.

        Raises:
            EngineDeadError: The next stage has ended.
        """
        if self._error is not None:
            raise self._error
        self._queue.put(tensor.contiguous())

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Waits for the next tensor from the stage before.

        Raises:
            EngineDeadError: It has ended.
        """
        assert self._from_previous is not None
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        self._from_previous.receive_bytes_into(_memory(tensor))
        return tensor

    def close(self) -> None:
        """Closes the connections, and ends the thread."""
        self._queue.put(None)
        for channel in (self._to_next, self._from_previous):
            if channel is not None:
                channel.close()

    def _send_all(self, channel: Channel) -> None:
        while (tensor := self._queue.get()) is not None:
            try:
                channel.send_bytes_of(_memory(tensor))
            except EngineDeadError as error:
                self._error = error
                return


def _memory(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor, of any dtype."""
    return tensor.view(-1).view(torch.uint8).numpy().data
