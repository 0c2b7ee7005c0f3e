"""`TextConv`: a convolution over the tokens of each text, in both directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TextConv"]


class TextConv(nn.Module):
    """Maps each token and those beside it in its text to a row as wide as theirs, by a convolution and an activation.

    Args:
        size: Length of a row.
        width: Number of tokens that a token sees, itself in the middle; an odd number.
        groups: Number of groups of channels, each of which sees only itself.
        activation: Function of each element.
        dtype: Number type of the rows and the weights.
        device: Device of the weights. Their memory is not initialised.
    """

    def __init__(
        self,
        size: int,
        width: int,
        groups: int,
        activation: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        weight = torch.empty(size, size // groups, width, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.groups = groups
        self.activation = activation

    def forward(self, hidden: Tensor, query_start_loc: Tensor) -> Tensor:
        """Convolves the tokens of each text; outside of a text there are zeros.

        Args:
            hidden: `[num_tokens, size]`, the tokens of all texts.
            query_start_loc: `[num_texts + 1]` int32, prefix sums of the numbers of their tokens.

        Returns:
            `[num_tokens, size]`.
        """
        num_tokens, size = hidden.shape
        reach = self.weight.shape[2] // 2
        tokens = torch.arange(num_tokens, dtype=query_start_loc.dtype, device=hidden.device)
        # One row for all texts: zeros before the first text, between texts, and after the last one, keep them apart.
        texts = torch.searchsorted(query_start_loc, tokens, right=True)
        places = tokens + texts * reach
        row = hidden.new_zeros(num_tokens + len(query_start_loc) * reach, size).index_copy_(0, places, hidden)
        mixed = F.conv1d(row.T.unsqueeze(0), self.weight, self.bias, padding=reach, groups=self.groups)
        return self.activation(mixed[0].T[places])
