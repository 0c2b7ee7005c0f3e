"""`Linear`: a linear layer with one matrix, which consists of one or more named fused parts.

A fused layer (query, key and value; gate and up) is made by naming its fused parts. The loader fills each part through
its weight slot, and does not know that the blocks share a matrix. A dimension may be a shard of a larger one; the
weight slots then say which part of the checkpoint's tensor they take.

On a CPU the matrix is packed once, after loading, for our own kernel or for oneDNN. Products are then 1.1 to 5 times
faster (docs/recipes/model.md has the measurements).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import packed_gated_linear, packed_linear
from ...kernels.packed_linear import can_pack_panels, pack_panels
from ..parallel.shard import Dimension, as_shard
from .activation import Activation
from .input_format import PLAIN, InputFormat, Rows
from .weight_slot import WeightSlot

__all__ = ["GatedWeight", "Linear", "LinearBase", "PackedWeight", "Packs"]


class PackedWeight(Protocol):
    """A weight in a layout that is made for a matrix product on the CPU."""

    def multiply(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Returns `x W^T + b`, `[num_rows, out_features]` in `dtype`."""


@dataclass(frozen=True, slots=True, eq=False)
class PanelWeight:
    """A weight in the panels of `kernels.packed_linear`.

    Attributes:
        packed: The panels.
        out_features: Rows of the weight.
    """

    packed: Tensor
    out_features: int

    def multiply(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str = "") -> Tensor:
        """As `PackedWeight.multiply`, with an activation by its name in the kernel; the result is rounded once."""
        return packed_linear(x, self.packed, bias, self.out_features, dtype, activation=activation)


@dataclass(frozen=True, slots=True, eq=False)
class GatedWeight:
    """A weight in the panels of `kernels.packed_gated_linear`, used without the gate.

    Attributes:
        packed: The panels of gate and up.
    """

    packed: Tensor

    def multiply(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As `PackedWeight.multiply`, for a layer without a bias."""
        assert bias is None
        return packed_gated_linear(x, self.packed, activates=False).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class OneDnnWeight:
    """A weight in the layout that oneDNN has chosen.

    Attributes:
        packed: A tensor that only oneDNN's functions take.
    """

    packed: Tensor

    def multiply(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As `PackedWeight.multiply`; the result is rounded to the dtype of x first, then to `dtype`."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, bias, "none", [], "").to(dtype)


@runtime_checkable
class Packs(Protocol):
    """A module that changes the layout of its weights for the device after they are loaded."""

    def pack(self) -> None:
        """Changes the layout of the weights. Called once, after all weights of the model are loaded."""


class LinearBase(nn.Module):
    """The interface of all linear layers, which compute `x W^T + b` and differ in the way they store W.

    Attributes:
        input_format: The form of x that the layer before this one should write. A layer also takes plain rows.
    """

    input_format: InputFormat = PLAIN

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields every (name, weight slot) of the layer."""
        raise NotImplementedError

    def pack(self) -> None:
        """Changes the layout of the weights for the device. Called once, after all weights of the model are loaded."""

    @property
    def is_adapted(self) -> bool:
        """Whether the layer adds products of adapters in the step that runs now (`LoraLinear`)."""
        return False

    @property
    def plain(self) -> LinearBase:
        """The layer without adapters: the layer itself, or the one inside a `LoraLinear`."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[..., in_features]` to `[..., out_features]` in the same dtype."""
        raise NotImplementedError

    def forward_activated(self, x: Rows, activation: Activation) -> Tensor:
        """Computes `activation(forward(x))`, in one kernel if the layer has one for both."""
        return activation(self(x))

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward` with a result in float32, as precisely as the layer can."""
        return self(x).float()


class Linear(LinearBase):
    """Computes `x W^T + b`.

    Args:
        in_features: Columns of W.
        out_features: Rows of W, or the sizes of its named fused parts in order, e.g. `{"gate": 512, "up": 512}`. If the
            shard of a fused part is shorter than its room in W (`Shard.room`), the remaining rows are zeros.
        bias: Whether the layer has a b.
        dtype: Number type of W, b, x and the result.
        device: Device of W and b. Their memory is not initialised.
        weight_dtype: Number type of W, if a subclass stores it in another one; None for `dtype`.
    """

    def __init__(
        self,
        in_features: Dimension,
        out_features: Dimension | Mapping[str, Dimension],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        blocks = out_features if isinstance(out_features, Mapping) else {"": out_features}
        self._blocks = {name: as_shard(rows) for name, rows in blocks.items()}
        self._columns = as_shard(in_features)
        self._num_rows = sum(rows.room for rows in self._blocks.values())
        make = torch.empty if all(rows.length == rows.room for rows in self._blocks.values()) else torch.zeros
        weight = make(self._num_rows, self._columns.length, dtype=weight_dtype or dtype, device=device)
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(make(self._num_rows, dtype=dtype, device=device), requires_grad=False)
        self._packed: PackedWeight | None = None

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields every (name, weight slot), such as `weight`, or `gate.weight` and `up.weight` of a fused layer."""
        for name, _ in self.named_parameters(recurse=False):
            first = 0
            for block, rows in self._blocks.items():
                parts = (rows, self._columns) if name == "weight" else (rows,)
                last, end = first + rows.length, first + rows.room
                padding = self._slot(name, slice(last, end)).targets
                slot = replace(self._slot(name, slice(first, last)), parts=parts, padding=padding)
                yield f"{block}.{name}".lstrip("."), slot
                first = end

    def _slot(self, name: str, rows: slice) -> WeightSlot:
        """Returns a weight slot of some rows of a parameter; a subclass adds scales and the encoding here."""
        return WeightSlot((self.get_parameter(name)[rows],), by_row=True)

    def pack(self) -> None:
        """Packs the weight for the CPU's matrix products, and drops the unpacked copy.

        Called once, after all weights of the model are loaded. Does nothing on another device.
        """
        if self.weight is not None:
            self._packed = self._pack(self.weight.detach())
            self.weight = None if self._packed else self.weight

    def pack_as(self, packed: PackedWeight) -> None:
        """Takes the weight in a layout that the network around the layer has made, and drops the unpacked copy."""
        self._packed, self.weight = packed, None

    def _pack(self, weight: Tensor) -> PackedWeight | None:
        """Returns the weight in the fastest layout for this machine; None to keep it unpacked."""
        if can_pack_panels(weight):
            return PanelWeight(pack_panels(weight), len(weight))
        return pack_for_onednn(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[..., in_features]` to `[..., out_features]` in the same dtype."""
        if self._packed is not None:
            return self._packed.multiply(x, self.bias, x.dtype)
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)

    def forward_activated(self, x: Rows, activation: Activation) -> Tensor:
        """Computes `activation(forward(x))`. With a `PanelWeight` the sum is not rounded before the activation."""
        if activation.fused and isinstance(self._packed, PanelWeight):
            assert isinstance(x, Tensor)
            return self._packed.multiply(x, self.bias, x.dtype, activation.fused)
        return activation(self(x))

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward` with a result in float32.

        With a `PanelWeight`, and with 16-bit numbers on a GPU, the result is not rounded to the dtype of x in between;
        in all other cases it is.
        """
        if self._packed is not None:
            return self._packed.multiply(x, self.bias, torch.float32)
        if not can_widen(x):
            return self(x).float()
        assert self.weight is not None
        product = torch.mm(x, self.weight.t(), out_dtype=torch.float32)
        return product if self.bias is None else product.add_(self.bias)


def can_widen(x: Tensor) -> bool:
    """Returns whether torch multiplies x by a matrix with a result in float32: 16-bit numbers on a GPU."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def pack_for_onednn(weight: Tensor) -> OneDnnWeight | None:
    """Packs a weight for oneDNN; returns None if oneDNN cannot multiply by it on this machine."""
    return OneDnnWeight(torch.ops.mkldnn._reorder_linear_weight.default(weight)) if _can_pack(weight) else None


def _can_pack(weight: Tensor) -> bool:
    """Returns whether oneDNN can multiply by this weight on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
