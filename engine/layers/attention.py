"""Self-attention over a paged KV cache, for any mix of prompts, chunks and decoded tokens.

Legend: T tokens of the step, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...kernels import paged_attention
from ..batch import ForwardBatch
from .linear import LinearBase
from .rotate_and_store import RotateAndStore, StoreOnly

__all__ = ["Attention", "Heads"]


@dataclass(frozen=True, slots=True)
class Heads:
    """How an attention layer is divided: the heads of one rank.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves `num_heads / num_kv_heads` query heads.
        head_dim: Size of a head.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int


class Attention(nn.Module):
    """Projects, rotates, stores keys and values, attends, projects back.

    Args:
        heads: How many heads of which size.
        qkv: The fused query, key and value projections, `[hidden_size] -> [(H + 2 K) * D]`.
        out: `[H * D] -> [hidden_size]`.
        rotate_and_store: Gives queries and keys their positions, and writes keys and values to the cache.
        scale: Factor on the product of a query and a key.
        softcap: Smooth bound on the scores; 0 for none.
        causal: Whether a token sees only itself and the tokens before it.
        window: Keys a query sees, itself included; 0 is all before it.
        group: The group of layers whose block table it uses.
        deterministic: Whether a token's result must not depend, to the bit, on the rest of the batch.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        qkv: LinearBase,
        out: LinearBase,
        rotate_and_store: RotateAndStore | StoreOnly,
        scale: float,
        softcap: float,
        causal: bool,
        window: int,
        group: int,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.out = out
        self.rotate_and_store = rotate_and_store
        self.scale = scale
        self.softcap = softcap
        self.causal = causal
        self.window = window
        self.group = group
        self.deterministic = deterministic
        self.head_dim = heads.head_dim
        self._split = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        self._num_rows = sum(self._split)

    def forward(self, hidden: Tensor, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attends from the tokens of `batch` to their sequences' cached tokens and themselves.

        Args:
            hidden: `[T, hidden_size]`.
            batch: Positions, and where keys and values are and go.
            k_cache: `[num_blocks, K, block_size, D]`; this step's keys are written to it.
            v_cache: The same for values.

        Returns:
            `[T, hidden_size]`; where ranks share the heads, a part: the sum over the ranks is the result.
        """
        qkv = self.qkv(hidden).view(-1, self._num_rows, self.head_dim)  # [T, H + 2 K, D]
        query, key, value = qkv.split(self._split, dim=1)
        slots = batch.slot_mappings[self.group]
        self.rotate_and_store(query, key, value, k_cache, v_cache, slots, batch.positions)
        attended = paged_attention(
            query,
            k_cache,
            v_cache,
            batch.block_tables[self.group],
            batch.seq_lens,
            batch.query_start_loc,
            self.scale,
            self.window,
            causal=self.causal,
            softcap=self.softcap,
            num_decodes=batch.num_decodes,
            num_shared=batch.num_shared,
            deterministic=self.deterministic,
        )
        return self.out(attended.flatten(1))
