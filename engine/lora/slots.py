"""`DeviceSlots`: the adapter slots of a model, which hold the adapters that the running sequences use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from .adapter import Adapter, LowRank
from .routing import Routing

__all__ = ["DeviceSlots", "NewAdapter", "SlotSizes"]


@dataclass(frozen=True, slots=True)
class SlotSizes:
    """The sizes of the adapter slots of a model.

    Attributes:
        num_slots: Number of adapters that can be resident on the device at once (`max_loras`).
        max_rank: Largest rank of an adapter's matrices (`max_lora_rank`).
    """

    num_slots: int
    max_rank: int


@dataclass(frozen=True, slots=True, eq=False)
class NewAdapter:
    """An adapter that enters an adapter slot before a step.

    Attributes:
        slot: Index of the slot. No sequence of a later step uses the adapter that was in it.
        adapter: The adapter.
    """

    slot: int
    adapter: Adapter


class Adapted(Protocol):
    """A layer that adapters change. It has room for each slot's part of an adapter."""

    @property
    def parts(self) -> Mapping[str, tuple[int, int]]:
        """Our path of each fused part of the layer, -> rows and columns of its whole matrix."""
        ...

    def load(self, slot: int, updates: Mapping[str, LowRank]) -> None:
        """Fills a slot with the updates of the layer's parts; a part without an update is left as it is."""
        ...


class DeviceSlots:
    """The adapter slots of a model: a place for one adapter each, in all layers that adapters change.

    Only the model's layers hold this object beside the model. It is the way in which a step tells them which of its
    tokens have which adapter (docs/decisions/0048-adapters.md).

    Args:
        sizes: The number of slots, and their size.

    Attributes:
        sizes: The number of slots, and their size.
        layers: The layers that adapters change.
        routing: The tokens with adapters of the step that runs now; None if it has none.
    """

    def __init__(self, sizes: SlotSizes) -> None:
        self.sizes = sizes
        self.layers: list[Adapted] = []
        self.routing: Routing | None = None

    def load(self, slot: int, adapter: Adapter) -> None:
        """Uploads an adapter to a slot. The device runs this after the steps that were started before."""
        for layer in self.layers:
            layer.load(slot, adapter.updates)

    @contextmanager
    def routed(self, routing: Routing | None) -> Iterator[None]:
        """Makes the layers add the adapters' products to the tokens that `routing` names, for the time of a block."""
        self.routing = routing
        try:
            yield
        finally:
            self.routing = None
