"""`DeviceSlots`: the adapter slots of a model, which hold the adapters that the running sequences use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..device import to_device
from .adapter import Adapter, LowRank, NewRows
from .routing import NO_SLOT, Routing, pack_routing

__all__ = ["DeviceSlots", "NewAdapter", "SlotSizes"]

EMBEDDING = "embed_tokens"
"""Our path of the token embedding."""

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

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yields the matrices of the slots, and with `recurse` the buffers of the layer that adapters change."""
        ...


class Table(Protocol):
    """A token embedding or an output head, of which adapters may replace rows."""

    @property
    def name(self) -> str:
        """Our path of the table."""
        ...

    def load_rows(self, slot: int, new_rows: Mapping[str, NewRows]) -> None:
        """Fills a slot with the rows that replace some of the table's own; without any, the slot becomes empty."""
        ...


class DeviceSlots:
    """The adapter slots of a model: a place for one adapter each, in all layers that adapters change.

    Only the model's layers hold this object beside the model. It is the way in which a step tells them which of its
    tokens have which adapter (docs/decisions/0048-adapters.md).

    Args:
        sizes: The number of slots, and their size.

    Attributes:
        sizes: The number of slots, and their size.
        layers: The layers to which adapters add products.
        heads: Our paths of the layers that compute some rows of a step only, after the forward pass.
        tables: The layers of which adapters replace rows.
        routing: The tokens with adapters of the step that runs now; None if it has none.
    """

    def __init__(self, sizes: SlotSizes) -> None:
        self.sizes = sizes
        self.layers: list[Adapted] = []
        self.heads: set[str] = set(HEADS)
        self.tables: list[Table] = []
        self.routing: Routing | None = None
        self._with_head: set[int] = set()  # The slots whose adapters change an output head.
        self._grouped: set[int] = set()  # The slots whose adapters change more than linear layers.

    def load(self, slot: int, adapter: Adapter) -> None:
        """Uploads an adapter to a slot. The device runs this after the steps that were started before."""
        for layer in self.layers:
            layer.load(slot, adapter.updates)
        for table in self.tables:
            table.load_rows(slot, adapter.new_rows)
        _mark(self._with_head, slot, self.heads & {*adapter.updates, *adapter.new_rows})
        _mark(self._grouped, slot, EMBEDDING in adapter.updates or adapter.new_rows)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the matrices of all slots."""
        return sum(matrix.nbytes for layer in self.layers for matrix in layer.buffers(recurse=False))

    def can_record(self, slots: np.ndarray) -> bool:
        """Returns whether a step of sequences in some slots may be recorded; `NO_SLOT` stands for no adapter.

        The tensors of the adapters that change more than linear layers have no fixed place in memory.
        """
        return not np.isin(slots, list(self._grouped)).any()

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
        packed = to_device(pack_routing(slots, self.sizes.num_slots, num_tokens), torch.int32, device)
        grouped = sorted(self._grouped.intersection(slots.tolist()))
        groups = {slot: to_device(np.flatnonzero(slots == slot), torch.int64, device) for slot in grouped}
        return Routing(packed, self.sizes.num_slots, groups)

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


def _mark(slots: set[int], slot: int, belongs: object) -> None:
    """Puts a slot into a set or takes it out, as `belongs` is true or not."""
    slots.discard(slot)
    if belongs:
        slots.add(slot)
