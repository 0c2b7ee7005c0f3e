"""Agreement of all ranks, over the connections that each has with rank 0."""

from __future__ import annotations

from .channel import Channel

__all__ = ["Star"]


class Star:
    """All ranks, as `parallel.World`.

    Args:
        channels: Rank 0's to each of the others; the others' to rank 0.
        rank: This one.
    """

    def __init__(self, channels: list[Channel], rank: int) -> None:
        self._channels = channels
        self._rank = rank

    def smallest(self, value: int) -> int:
        """Returns the smallest of all ranks' values.

        Raises:
            MillraceError: A rank has ended, or told what it failed at.
        """
        if self._rank:
            (channel,) = self._channels
            channel.send_object(value)
            return int(channel.receive_object())
        values = [value]
        for channel in self._channels:
            told = channel.receive_object()
            if isinstance(told, Exception):
                raise told
            values.append(told)
        for channel in self._channels:
            channel.send_object(min(values))
        return min(values)
