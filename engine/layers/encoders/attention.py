"""`EncoderAttention`: self-attention over whole texts, in both directions, without a KV cache.

Letters in shapes: T tokens of the step, H query heads, K key and value heads, D size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....kernels import varlen_attention
from ...batch import ForwardBatch
from ..attention import Heads
from ..input_format import InputFormat, Rows
from ..linear import LinearBase
from ..rotate_and_store import CacheWriter
from .relative_bias import DistanceBias

__all__ = ["EncoderAttention"]


class EncoderAttention(nn.Module):
    """An attention layer of an encoder: projects, rotates if positions are rotary, attends, projects back.

    Args:
        heads: The heads of this rank: H query heads, K key and value heads, of size D.
        qkv: The fused query, key and value projections, `[hidden_size] -> [(H + 2 K) * D]`.
        out: The output projection, `[H * D] -> [hidden_size]`.
        rotate_and_store: Rotates queries and keys by their positions and norms them, as in `Attention`; None for a
            model that does neither.
        scale: Factor on the product of a query and a key.
        softcap: Smooth limit on the scores; 0 for no limit.
        window: Number of tokens that a token sees on either side, its own included; 0 for all.
        distance_bias: Amounts that are added to the scores by distance; None for none.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        qkv: LinearBase,
        out: LinearBase,
        rotate_and_store: CacheWriter | None,
        scale: float,
        softcap: float,
        window: int,
        distance_bias: DistanceBias | None,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.out = out
        self.rotate_and_store = rotate_and_store
        self.scale = scale
        self.softcap = softcap
        self.window = window
        self.head_dim = heads.head_dim
        self._split = (heads.query.length, heads.num_kv_heads, heads.num_kv_heads)
        self._distance_bias = distance_bias

    @property
    def input_format(self) -> InputFormat:
        """The form in which the layer reads its input."""
        return self.qkv.input_format

    def forward(self, hidden: Rows, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attends from each token of a step to all tokens of its text.

        Args:
            hidden: `[T, hidden_size]`, the T tokens of the step.
            batch: The texts, whole, and the positions of their tokens.
            k_cache: Is not read.
            v_cache: Is not read.

        Returns:
            `[T, hidden_size]`. When ranks share the heads, this is one addend: the result is the sum over the ranks.
        """
        qkv = self.qkv(hidden).view(-1, sum(self._split), self.head_dim)  # [T, H + 2 K, D]
        query, key, value = qkv.split(self._split, dim=1)
        if self.rotate_and_store is not None:
            key, value = self._rotate(self.rotate_and_store, query, key, value, batch.positions)
        attended = varlen_attention(
            query,
            key,
            value,
            batch.query_start_loc,
            batch.longest_prompt or len(query),
            self.scale,
            self.window,
            softcap=self.softcap,
            distance_bias=None if self._distance_bias is None else self._distance_bias(),
        )
        return self.out(attended.flatten(1))

    def _rotate(
        self, rotate_and_store: CacheWriter, query: Tensor, key: Tensor, value: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotates the queries in place; returns the rotated keys, and the values, `[T, K, D]`."""
        num_tokens, num_kv_heads, head_dim = key.shape
        # The kernels write keys and values to a cache, so they get one block that holds all tokens of the step.
        caches = torch.empty((2, 1, num_kv_heads, num_tokens, head_dim), dtype=key.dtype, device=key.device)
        slots = torch.arange(num_tokens, device=key.device)
        rotate_and_store(query, key, value, caches[0], caches[1], slots, positions)
        keys, values = caches[:, 0].transpose(1, 2).unbind()
        return keys, values
