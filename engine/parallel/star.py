"""`Star`: operations over all ranks, through the channels between rank 0 and each other rank."""

from __future__ import annotations

from typing import Any

from .channel import Channel

__all__ = ["Star"]


class Star:
    """A `World` over channels: rank 0 receives the values of all ranks and sends back the result.

    Args:
        channels: In rank 0 its channels to all other ranks, in another rank its channel to rank 0.
        rank: This rank.
    """

    def __init__(self, channels: list[Channel], rank: int) -> None:
        self._channels = channels
        self._rank = rank

    def gather(self, value: Any) -> list[Any]:
        """Waits until each rank has called with its value, and returns these values in the order of ranks.

        Raises:
            MillraceError: A rank has ended, or has sent the error with which it failed.
        """
        if self._rank:
            (channel,) = self._channels
            channel.send_object(value)
            values: list[Any] = channel.receive_object()
            return values
        values = [value]
        for channel in self._channels:
            told = channel.receive_object()
            if isinstance(told, Exception):
                raise told
            values.append(told)
        for channel in self._channels:
            channel.send_object(values)
        return values

    def smallest(self, value: int) -> int:
        """Waits until each rank has called with its value, and returns the smallest of these values; see `gather`."""
        return int(min(self.gather(value)))
