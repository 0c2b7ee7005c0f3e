"""`FullPrecision`: the default scheme, in which matrices have the dtype of the model."""

from __future__ import annotations

import torch

from ..device import Device
from ..layers import Experts, ExpertsLayer, InvariantLinear, Linear
from .scheme import LinearSpec, QuantizationScheme

__all__ = ["FullPrecision"]


class FullPrecision(QuantizationScheme):
    """Stores and multiplies matrices in the dtype of the model; accepts layers of all sizes."""

    def check(self, device: Device, dtype: torch.dtype) -> None:
        """Accepts every device and dtype."""

    def supports_sizes(self, layer: LinearSpec) -> bool:
        """Returns True for every layer."""
        return True

    def make_linear(self, layer: LinearSpec) -> Linear:
        """Makes a `Linear`, or an `InvariantLinear` if the engine is deterministic."""
        kind = InvariantLinear if self.deterministic else Linear
        return kind(layer.in_features, layer.blocks, bias=layer.bias, dtype=layer.dtype, device=layer.device)

    def make_experts(self, layer: ExpertsLayer) -> Experts:
        """Makes experts of all sizes."""
        return Experts(layer, deterministic=self.deterministic)
