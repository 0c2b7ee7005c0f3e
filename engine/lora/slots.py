"""`DeviceSlots`: the adapter slots of a model, which hold the adapters that the running sequences use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..device import to_device
from .adapter import Adapter, LowRank
from .routing import NO_SLOT, Routing, pack_routing

__all__ = ["DeviceSlots", "NewAdapter", "SlotSizes"]

HEADS = frozenset({"lm_head", "score"})
"""Our paths of the output heads, which compute some rows of a step only, after the forward pass."""


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
        self._with_head: set[int] = set()  # The slots whose adapters change an output head.

    def load(self, slot: int, adapter: Adapter) -> None:
        """Uploads an adapter to a slot. The device runs this after the steps that were started before."""
        for layer in self.layers:
            layer.load(slot, adapter.updates)
        self._with_head.discard(slot)
        if HEADS & adapter.updates.keys():
            self._with_head.add(slot)

    def route(self, slots: np.ndarray, num_tokens: int, device: torch.device) -> Routing | None:
        """Makes the routing of a step.

        Args:
            slots: Adapter slot of each token; `NO_SLOT` for none.
            num_tokens: Number of tokens to which the step is padded.
            device: Device of the model.

        Returns:
            The routing; None if no token has an adapter.
        """
        if (slots == NO_SLOT).all():
            return None
        num_slots = self.sizes.num_slots
        return Routing(to_device(pack_routing(slots, num_slots, num_tokens), torch.int32, device), num_slots)

    def route_head(self, slots: np.ndarray, device: torch.device) -> Routing | None:
        """Makes the routing of the rows of an output head, as `route`; None if no row's adapter changes a head."""
        return self.route(np.where(np.isin(slots, list(self._with_head)), slots, NO_SLOT), len(slots), device)

    @contextmanager
    def routed(self, routing: Routing | None) -> Iterator[None]:
        """Makes the layers add the adapters' products to the tokens that `routing` names, for the time of a block."""
        self.routing = routing
        try:
            yield
        finally:
            self.routing = None
