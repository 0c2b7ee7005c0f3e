"""`Mamba2`: a layer that mixes tokens through a recurrence, whose state has a fixed size (Dao and Gu, 2024).

Letters in shapes: T tokens of the step, H heads of size P, G groups of heads, N size of their vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ....kernels import state_scan
from ...batch import ForwardBatch
from ..input_format import InputFormat, Rows
from ..linear import LinearBase
from ..weight_slot import WeightSlot
from .gated_norm import GatedNorm
from .heads import StateHeads
from .short_conv import ShortConv

__all__ = ["Mamba2"]


class Mamba2(nn.Module):
    """A Mamba-2 layer: projects, convolves, runs the recurrence, gates and norms, and projects back.

    Args:
        sizes: The heads of this rank: H heads of size P, in G groups with vectors of size N.
        in_proj: The fused projections of a token to its gate `[H * P]`, the channels `[H * P + 2 G * N]` of the
            convolution, and the step sizes `[H]`.
        conv: The convolution.
        norm: The norm before the output projection.
        out_proj: The output projection, `[H * P] -> [hidden_size]`.
        device: Device of the parameters of the heads. Their memory is not initialised.
    """

    def __init__(
        self,
        sizes: StateHeads,
        *,
        in_proj: LinearBase,
        conv: ShortConv,
        norm: GatedNorm,
        out_proj: LinearBase,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_proj = in_proj
        self.conv = conv
        self.norm = norm
        self.out_proj = out_proj
        self._sizes = sizes
        self._channels = [sizes.inner.length, sizes.vectors.length, sizes.vectors.length]
        self._split = [sizes.inner.length, sum(self._channels), sizes.heads.length]
        self.rate, self.dt_bias, self.skip = (
            nn.Parameter(torch.empty(sizes.heads.length, dtype=torch.float32, device=device), requires_grad=False)
            for _ in range(3)
        )

    @property
    def input_format(self) -> InputFormat:
        """The form in which the layer reads its input."""
        return self.in_proj.input_format

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields the weight slots of the heads; checkpoints hold the logarithm of the rate of decay."""
        parts = (self._sizes.heads,)
        yield "A_log", WeightSlot((self.rate,), encode=lambda logarithm: (-logarithm.float().exp(),), parts=parts)
        yield "dt_bias", WeightSlot((self.dt_bias,), parts=parts)
        yield "D", WeightSlot((self.skip,), parts=parts)

    def forward(self, hidden: Rows, batch: ForwardBatch, inputs: Tensor, matrices: Tensor) -> Tensor:
        """Mixes the tokens of `batch` with those before them in their sequences.

        Args:
            hidden: `[T, hidden_size]`, the T tokens of the step.
            batch: The sequences of the tokens, and the rows that they own.
            inputs: `[num_rows, conv_width - 1, H * P + 2 G * N]`, the last inputs of the convolution; updated in place.
            matrices: `[num_rows, H, P, N]` float32, the states of the heads; updated in place.

        Returns:
            `[T, hidden_size]`. When ranks share the heads, this is one addend: the result is the sum over the ranks.
        """
        gate, channels, dt = self.in_proj(hidden).split(self._split, dim=1)
        x, b, c = self.conv(channels, batch, inputs).split(self._channels, dim=1)
        heads, vectors = (-1, self._sizes.head_dim), (-1, self._sizes.state_size)
        mixed = state_scan(
            x.unflatten(1, heads),
            dt,
            b.unflatten(1, vectors),
            c.unflatten(1, vectors),
            matrices,
            batch.rows,
            batch.query_start_loc,
            batch.seq_lens,
            rate=self.rate,
            dt_bias=self.dt_bias,
            skip=self.skip,
            num_decodes=batch.num_decodes,
        )
        return self.out_proj(self.norm(mixed.flatten(1), gate))
