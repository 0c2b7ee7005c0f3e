"""`Scale`: multiplies by a constant of the model, such as the multipliers of Granite."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Scale"]


class Scale(nn.Module):
    """Multiplies every number by a factor.

    Args:
        factor: The factor.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies `x`, of any shape, in place and returns it."""
        return x.mul_(self.factor)
