"""The default scheme: matrices keep the dtype of the model."""

from __future__ import annotations

import torch

from ..device import Device
from ..layers import InvariantLinear, Linear
from .scheme import LinearSpec, QuantizationScheme

__all__ = ["FullPrecision"]


class FullPrecision(QuantizationScheme):
    """Makes layers that store and multiply in the dtype of the model; it takes every layer."""

    def check(self, device: Device, dtype: torch.dtype) -> None:
        """Accepts every device and dtype."""

    def takes(self, layer: LinearSpec) -> bool:
        """Returns True."""
        return True

    def make_linear(self, layer: LinearSpec) -> Linear:
        """Makes a plain layer, or an invariant one where the engine is deterministic."""
        kind = InvariantLinear if self.deterministic else Linear
        return kind(layer.in_features, layer.blocks, bias=layer.bias, dtype=layer.dtype, device=layer.device)
