"""`ShortConv`: the causal convolution of each channel over the last tokens of its sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ....kernels import short_conv
from ...batch import ForwardBatch
from ...parallel.shard import Shard
from ..weight_slot import WeightSlot

__all__ = ["ShortConv"]


class ShortConv(nn.Module):
    """Convolves each channel with the last tokens of its sequence, and applies silu.

    Args:
        channels: The sizes of the named parts of the channels, in order.
        width: Number of tokens that the convolution sees, the token itself included.
        bias: Whether the convolution has a bias.
        dtype: Number type of the weights.
        device: Device of the weights. Their memory is not initialised.
    """

    def __init__(
        self, channels: Mapping[str, Shard], width: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self._channels, self._width = channels, width
        num_channels = sum(part.length for part in channels.values())
        weight = torch.empty(num_channels, 1, width, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(num_channels, dtype=dtype, device=device), requires_grad=False)

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields `x.weight`, `x.bias` and so on: the weight slots of each part of the channels."""
        first = 0
        for name, part in self._channels.items():
            rows = slice(first, first + part.length)
            yield f"{name}.weight", WeightSlot((self.weight[rows],), parts=(part, Shard(1), Shard(self._width)))
            if self.bias is not None:
                yield f"{name}.bias", WeightSlot((self.bias[rows],), parts=(part,))
            first += part.length

    def forward(self, x: Tensor, batch: ForwardBatch, inputs: Tensor) -> Tensor:
        """Convolves the tokens of a step.

        Args:
            x: `[num_tokens, num_channels]`.
            batch: The sequences of the tokens.
            inputs: `[num_rows, width - 1, num_channels]`, the last inputs of each row's sequence; updated in place.

        Returns:
            A tensor like x.
        """
        weight = self.weight.squeeze(1)
        return short_conv(x, weight, self.bias, inputs, batch.rows, batch.query_start_loc, batch.seq_lens)
