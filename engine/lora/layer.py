"""`LoraLinear`: a linear layer that adds the products of the tokens' adapters to its own product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from ...kernels import lora
from ..device import to_device
from ..layers import Activation, LinearBase, Rows, WeightSlot
from ..quantization.scheme import LinearSpec
from .adapter import LowRank
from .slots import DeviceSlots

__all__ = ["LoraLinear"]


class LoraLinear(LinearBase):
    """Computes `x W^T + b`, and for each token t with an adapter also `scale (x[t] A^T) B^T` of the adapter.

    Each fused part of the layer has its own A. The layer reads plain rows, because the adapters' products need them.

    Args:
        base: The layer that computes `x W^T + b`. It keeps its name in the model (`weight_slots`).
        layer: The description of the layer.
        slots: The adapter slots of the model, which the layer joins.
        device: Device of the adapters' matrices.

    Attributes:
        unadapted: The layer `base`.
        lora_a: `[num_slots, num_parts, max_rank, in_features]`, the matrices A, of which only `ranks` rows are read.
        lora_b: `[num_slots, max_rank, out_features]`, the transposed matrices B with the scale, beside each other.
        ranks: `[num_slots, num_parts]` int32, the rank of each update; 0 for none.
    """

    lora_a: Tensor
    lora_b: Tensor
    ranks: Tensor

    def __init__(self, base: LinearBase, layer: LinearSpec, slots: DeviceSlots, device: torch.device) -> None:
        super().__init__()
        self.unadapted = base
        self._layer = layer
        self._slots = slots
        self._part_ends = tuple(accumulate(rows.room for rows in layer.blocks.values()))
        sizes, num_parts = slots.sizes, len(layer.blocks)
        a_shape = (sizes.num_slots, num_parts, sizes.max_rank, layer.num_columns)
        b_shape = (sizes.num_slots, sizes.max_rank, self._part_ends[-1])
        self.register_buffer("lora_a", torch.zeros(a_shape, dtype=layer.dtype, device=device), persistent=False)
        self.register_buffer("lora_b", torch.zeros(b_shape, dtype=layer.dtype, device=device), persistent=False)
        ranks = torch.zeros((sizes.num_slots, num_parts), dtype=torch.int32, device=device)
        self.register_buffer("ranks", ranks, persistent=False)
        slots.layers.append(self)

    @property
    def parts(self) -> Mapping[str, tuple[int, int]]:
        """Our path of each fused part of the layer, -> rows and columns of its whole matrix."""
        layer = self._layer
        rows = (shard.size for shard in layer.blocks.values())
        return {name: (size, layer.in_features.size) for name, size in zip(layer.part_names, rows, strict=True)}

    def load(self, slot: int, updates: Mapping[str, LowRank]) -> None:
        """Fills a slot with this rank's part of the updates of the layer; a part without an update is left as it is."""
        ranks = []
        for index, (name, rows) in enumerate(zip(self._layer.part_names, self._layer.blocks.values(), strict=True)):
            update = updates.get(name)
            ranks.append(0 if update is None else update.rank)
            if update is not None:
                first = self._part_ends[index] - rows.room
                self._load_part(slot, index, slice(first, first + rows.length), update)
        self.ranks[slot] = to_device(ranks, torch.int32, self.ranks.device)

    def _load_part(self, slot: int, index: int, own: slice, update: LowRank) -> None:
        columns, rows = self._layer.in_features, list(self._layer.blocks.values())[index]
        a = update.a.narrow(1, columns.start, columns.length)
        b = update.b.narrow(0, rows.start, rows.length)
        self.lora_a[slot, index, : update.rank] = to_device(a, a.dtype, self.lora_a.device)
        self.lora_b[slot, : update.rank, own] = to_device(b, b.dtype, self.lora_b.device).t()

    @property
    def is_adapted(self) -> bool:
        """Whether the layer adds products of adapters in the step that runs now."""
        return self._slots.routing is not None

    @property
    def plain(self) -> LinearBase:
        """The layer without adapters."""
        return self.unadapted

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields nothing: the weights are those of `unadapted`, a submodule."""
        return iter(())

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[..., in_features]` to `[..., out_features]` in the same dtype."""
        return self._adapt(self.unadapted(x), x)

    def forward_activated(self, x: Rows, activation: Activation) -> Tensor:
        """Computes `activation(forward(x))`. Adapters are added before the activation."""
        if self.is_adapted:
            return activation(self(x))
        return self.unadapted.forward_activated(x, activation)

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward` with a result in float32, as precisely as the layer can."""
        return self._adapt(self.unadapted.forward_float32(x), x)

    def _adapt(self, out: Tensor, x: Tensor) -> Tensor:
        """Adds the products of the tokens' adapters to `out`, in place."""
        routing = self._slots.routing
        if routing is not None:
            rows, sums = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
            matrices = (self.lora_a, self.lora_b, self.ranks)
            lora(sums, rows, *matrices, routing.tokens, routing.starts, self._part_ends)
        return out
