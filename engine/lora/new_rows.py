"""`ReplacedRows`: an output head of which adapters replace rows: those of some tokens, or those of all classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...kernels import invariant_linear
from ..device import to_device
from ..layers import LinearBase, WeightSlot
from ..parallel.shard import Shard
from .adapter import NewRows
from .slots import DeviceSlots

__all__ = ["ReplacedRows"]


class ReplacedRows(LinearBase):
    """Computes `x W^T`, where an adapter of a row of x may have replaced rows of W.

    Args:
        base: The layer that computes `x W^T`. It keeps its name in the model (`weight_slots`).
        name: Our path of the layer.
        rows: The rows of W that this rank has.
        slots: The adapter slots of the model, which the layer joins.
        device: Device of the rows.

    Attributes:
        name: Our path of the layer.
        unadapted: The layer `base`.
    """

    def __init__(self, base: LinearBase, name: str, rows: Shard, slots: DeviceSlots, device: torch.device) -> None:
        super().__init__()
        self.unadapted = base
        self.name = name
        self._own = rows
        self._slots = slots
        self._device = device
        self._new_rows: dict[int, NewRows] = {}
        slots.tables.append(self)

    def load_rows(self, slot: int, new_rows: Mapping[str, NewRows]) -> None:
        """Fills a slot with this rank's part of the rows that replace some of the layer's own."""
        self._new_rows.pop(slot, None)
        if (new := new_rows.get(self.name)) is not None:
            local = new.indices - self._own.start
            is_own = (local >= 0) & (local < self._own.length)
            indices, rows = local[is_own], new.rows[is_own]
            if len(indices):
                indices = to_device(indices, torch.int64, self._device)
                self._new_rows[slot] = NewRows(indices, to_device(rows, rows.dtype, self._device))

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields nothing: the weights are those of `unadapted`, a submodule."""
        return iter(())

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[num_rows, in_features]` to `[num_rows, out_features]` in the same dtype."""
        return self._replace(self.unadapted(x), x)

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward` with a result in float32, as precisely as the layer can."""
        return self._replace(self.unadapted.forward_float32(x), x)

    def _replace(self, out: Tensor, x: Tensor) -> Tensor:
        """Replaces, in place, the results of the rows of W that the adapters have replaced."""
        routing = self._slots.routing
        for slot, tokens in routing.groups.items() if routing is not None else ():
            if (new := self._new_rows.get(slot)) is not None:
                products = invariant_linear(x[tokens].float(), new.rows.float(), None)
                out[tokens.unsqueeze(1), new.indices] = products.to(out.dtype)
        return out
