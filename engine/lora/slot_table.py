"""`SlotTable`: which adapter is in which adapter slot of the device, as the scheduler plans it."""

from __future__ import annotations

from collections import OrderedDict

from .adapter import Adapter

__all__ = ["SlotTable"]


class SlotTable:
    """Gives adapters slots on the device. A slot whose adapter no running sequence uses may be given to another one.

    Args:
        num_slots: Number of adapter slots.

    Attributes:
        num_uploads: Number of adapters that were uploaded to a slot so far.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_uploads = 0
        self._digests: list[bytes | None] = [None] * num_slots
        self._num_users = [0] * num_slots
        # The slots without users, the one that was left first comes first.
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))

    @property
    def has_idle(self) -> bool:
        """Whether there is a slot that no running sequence uses."""
        return bool(self._idle)

    def can_take(self, adapter: Adapter) -> bool:
        """Returns whether a sequence of an adapter can run now: the adapter is in a slot, or a slot is idle."""
        return bool(self._idle) or adapter.digest in self._digests

    def take(self, adapter: Adapter) -> tuple[int, bool]:
        """Counts a sequence that starts to run with an adapter; only if `can_take`.

        Returns:
            The slot of the adapter, and whether the adapter must be uploaded to it first.
        """
        is_new = adapter.digest not in self._digests
        if is_new:
            slot = next(iter(self._idle))
            self._digests[slot] = adapter.digest
            self.num_uploads += 1
        else:
            slot = self._digests.index(adapter.digest)
        self._num_users[slot] += 1
        self._idle.pop(slot, None)
        return slot, is_new

    def leave(self, slot: int) -> None:
        """Counts a sequence that no longer runs. The adapter stays in its slot until another one needs the slot."""
        self._num_users[slot] -= 1
        if not self._num_users[slot]:
            self._idle[slot] = None

    def forget(self, slot: int) -> None:
        """Notes that a slot may not hold its adapter, because the step that should have uploaded it failed."""
        self._digests[slot] = None

    def check_integrity(self, in_use: list[int]) -> None:
        """Checks that the users of each slot are the running sequences of its adapter.

        Args:
            in_use: The slot of each running sequence that has one.

        Raises:
            AssertionError: A user is lost or counted twice.
        """
        counts = [in_use.count(slot) for slot in range(len(self._num_users))]
        assert counts == self._num_users, f"slots {counts} are in use, and {self._num_users} are counted"
        assert set(self._idle) == {slot for slot, count in enumerate(counts) if not count}, "idle slots are miscounted"
