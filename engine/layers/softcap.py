"""`Softcap`: the smooth limit on logits of Gemma 2."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Softcap"]


class Softcap(nn.Module):
    """Computes `cap * tanh(x / cap)`, which lies between `-cap` and `cap`.

    Args:
        cap: The limit, a positive number.
    """

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        """Limits `logits`, of any shape, in place and returns them."""
        return logits.div_(self.cap).tanh_().mul_(self.cap)
