"""`GatedDelta`: a layer that mixes tokens through a memory, whose state has a fixed size (Yang et al., 2024).

Letters in shapes: T tokens of the step, H heads of size P, G groups of heads, N size of their queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ....kernels import gated_delta
from ...batch import ForwardBatch
from ..input_format import InputFormat, Rows
from ..linear import LinearBase
from ..weight_slot import WeightSlot
from .gated_norm import NormAndGate
from .heads import StateHeads
from .short_conv import ShortConv

__all__ = ["GatedDelta"]


class GatedDelta(nn.Module):
    """A gated delta network: projects, convolves, runs the recurrence, norms and gates, and projects back.

    Args:
        sizes: The heads of this rank: H heads of size P, in G groups with queries and keys of size N.
        in_proj: The fused projections of a token to the channels `[2 G * N + H * P]` of the convolution, its gate
            `[H * P]`, and for each head the strength of what it stores `[H]` and the decay of its memory `[H]`.
        conv: The convolution.
        norm: The norm and the gate before the output projection.
        out_proj: The output projection, `[H * P] -> [hidden_size]`.
        device: Device of the parameters of the heads. Their memory is not initialised.
    """

    def __init__(
        self,
        sizes: StateHeads,
        *,
        in_proj: LinearBase,
        conv: ShortConv,
        norm: NormAndGate,
        out_proj: LinearBase,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_proj = in_proj
        self.conv = conv
        self.norm = norm
        self.out_proj = out_proj
        self._sizes = sizes
        inner, vectors, num_heads = sizes.inner.length, sizes.vectors.length, sizes.heads.length
        self._channels = [vectors, vectors, inner]
        self._split = [sum(self._channels), inner, num_heads, num_heads]
        self.rate, self.decay_bias = (
            nn.Parameter(torch.empty(num_heads, dtype=torch.float32, device=device), requires_grad=False)
            for _ in range(2)
        )

    @property
    def input_format(self) -> InputFormat:
        """The form in which the layer reads its input."""
        return self.in_proj.input_format

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields the weight slots of the heads; checkpoints hold the logarithm of the rate of decay."""
        parts = (self._sizes.heads,)
        yield "A_log", WeightSlot((self.rate,), encode=lambda logarithm: (-logarithm.float().exp(),), parts=parts)
        yield "dt_bias", WeightSlot((self.decay_bias,), parts=parts)

    def forward(self, hidden: Rows, batch: ForwardBatch, inputs: Tensor, matrices: Tensor) -> Tensor:
        """Mixes the tokens of `batch` with those before them in their sequences.

        Args:
            hidden: `[T, hidden_size]`, the T tokens of the step.
            batch: The sequences of the tokens, and the rows that they own.
            inputs: `[num_rows, conv_width - 1, 2 G * N + H * P]`, the last inputs of the convolution; updated in place.
            matrices: `[num_rows, H, P, N]` float32, the states of the heads; updated in place.

        Returns:
            `[T, hidden_size]`. When ranks share the heads, this is one addend: the result is the sum over the ranks.
        """
        channels, gate, beta, decay = self.in_proj(hidden).split(self._split, dim=1)
        query, key, value = self.conv(channels, batch, inputs).split(self._channels, dim=1)
        heads, vectors = (-1, self._sizes.head_dim), (-1, self._sizes.state_size)
        mixed = gated_delta(
            query.unflatten(1, vectors),
            key.unflatten(1, vectors),
            value.unflatten(1, heads),
            decay,
            beta,
            matrices,
            rows=batch.rows,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            rate=self.rate,
            decay_bias=self.decay_bias,
            num_decodes=batch.num_decodes,
        )
        return self.out_proj(self.norm(mixed, gate.unflatten(1, heads)).flatten(1))
