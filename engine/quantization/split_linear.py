"""`SplitLinear`: a linear layer whose fused parts are layers of their own, because they are stored differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..layers import LinearBase, WeightSlot

__all__ = ["SplitLinear"]


class SplitLinear(LinearBase):
    """Computes each fused part by a layer of its own, and joins their outputs.

    Args:
        parts: The layer of each part, by its name, under which it becomes a submodule.
    """

    def __init__(self, parts: Mapping[str, LinearBase]) -> None:
        super().__init__()
        self._names = tuple(parts)
        for name, part in parts.items():
            self.add_module(name, part)

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields nothing: the parts are submodules, which have the weight slots, under the same names."""
        return iter(())

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[..., in_features]` to `[..., out_features]` in the same dtype."""
        return torch.cat([part(x) for part in self._parts()], dim=-1)

    def forward_float32(self, x: Tensor) -> Tensor:
        """Computes `forward` with a result in float32, as precisely as each part can."""
        return torch.cat([part.forward_float32(x) for part in self._parts()], dim=-1)

    def _parts(self) -> Iterator[LinearBase]:
        for name in self._names:
            part = self.get_submodule(name)
            assert isinstance(part, LinearBase)
            yield part
