"""`Attention`: self-attention over a paged KV cache, for any mix of prompts, chunks of prompts and decoded tokens.

Letters in shapes: T tokens of the step, H query heads, K key and value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import paged_attention
from ...kernels.paged_attention import PromptLibrary
from ..batch import ForwardBatch
from ..parallel.shard import Shard
from .input_format import InputFormat, Rows
from .kv_scales import KVScales
from .linear import LinearBase
from .rotate_and_store import CacheWriter
from .weight_slot import WeightSlot

__all__ = ["Attention", "Heads"]


@dataclass(frozen=True, slots=True)
class Heads:
    """The numbers of heads that one rank computes in an attention layer, and their size.

    Attributes:
        query: The query heads of this rank among those of the model.
        num_kv_heads: Number of key and value heads; each serves `query.length / num_kv_heads` query heads.
        head_dim: Size of a head.
        num_gates: Number of query heads whose results have a gate: all or none.
    """

    query: Shard
    num_kv_heads: int
    head_dim: int
    num_gates: int = 0


class Attention(nn.Module):
    """An attention layer: projects, rotates, stores keys and values in the cache, attends, projects back.

    Args:
        heads: The heads of this rank: H query heads, K key and value heads, of size D.
        qkv: The fused query, key and value projections, `[hidden_size] -> [(H + 2 K) * D]`, and that of gates if there
            are any, another `[H * D]`.
        out: The output projection, `[H * D] -> [hidden_size]`.
        rotate_and_store: Rotates queries and keys by their positions, and writes keys and values to the cache.
        kv_scales: Scales of the keys and values in an 8-bit cache.
        scale: Factor on the product of a query and a key.
        softcap: Smooth limit on the scores; 0 for no limit.
        causal: Whether a token attends only to itself and the tokens before it.
        sinks: Device for the parameter `sinks`, one learned score for each query head, which takes part in the softmax
            as the score of one more key whose value is zero; None for a layer without this parameter.
        alibi_slopes: `[H]` float32, the amount that a score loses for each token of distance; None for none.
        window: Number of latest tokens that a token attends to, its own included; 0 for all.
        group: Index of the group of layers to which this layer belongs, and whose block tables it reads.
        deterministic: Whether a token's result must not depend, to the bit, on the rest of the batch.
        library: Library for prompts without cached context; None for our own kernel.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        qkv: LinearBase,
        out: LinearBase,
        rotate_and_store: CacheWriter,
        kv_scales: KVScales,
        scale: float,
        softcap: float,
        causal: bool,
        sinks: torch.device | None,
        alibi_slopes: Tensor | None,
        window: int,
        group: int,
        deterministic: bool,
        library: PromptLibrary | None = None,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.out = out
        self.rotate_and_store = rotate_and_store
        self.kv_scales = kv_scales
        self.scale = scale
        self.softcap = softcap
        self.causal = causal
        self.window = window
        self.group = group
        self.deterministic = deterministic
        self.library = library
        self.head_dim = heads.head_dim
        self._heads = heads.query
        self._split = (heads.query.length, heads.num_kv_heads, heads.num_kv_heads, heads.num_gates)
        self._num_rows = sum(self._split)
        self.alibi_slopes: Tensor | None
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.sinks: nn.Parameter | None = None
        if sinks is not None:
            scores = torch.empty(heads.query.length, dtype=torch.float32, device=sinks)
            self.sinks = nn.Parameter(scores, requires_grad=False)

    @property
    def input_format(self) -> InputFormat:
        """The form in which the layer reads its input."""
        return self.qkv.input_format

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields the name `sinks` and the weight slot of this rank's scores, if the layer has sinks; else nothing."""
        if self.sinks is not None:
            yield "sinks", WeightSlot((self.sinks,), parts=(self._heads,))

    def forward(self, hidden: Rows, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attends from the tokens of `batch` to their sequences' cached tokens and themselves.

        Args:
            hidden: `[T, hidden_size]`, the T tokens of the step.
            batch: Positions, block tables and slots of the tokens.
            k_cache: `[num_blocks, K, block_size, D]`; the keys of this step are written to it.
            v_cache: A cache of the same shape; the values of this step are written to it.

        Returns:
            `[T, hidden_size]`. When ranks share the heads, this is one addend: the result is the sum over the ranks.
        """
        qkv = self.qkv(hidden).view(-1, self._num_rows, self.head_dim)  # [T, H + 2 K (+ H), D]
        query, key, value, gates = qkv.split(self._split, dim=1)
        slots, kv_scales = batch.slot_mappings[self.group], self.kv_scales.of(k_cache)
        self.rotate_and_store(query, key, value, k_cache, v_cache, slots, batch.positions, kv_scales=kv_scales)
        attended = None
        if self.library is not None and batch.longest_prompt and kv_scales is None:
            attended = self._attend_prompts(self.library, query, batch, k_cache, v_cache)
        if attended is None:
            attended = self._attend(query, batch, k_cache, v_cache)
        if gates.shape[1]:
            attended = attended * gates.sigmoid()
        return self.out(attended.flatten(1))

    def _attend(self, query: Tensor, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attends from all tokens of a batch."""
        return paged_attention(
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
            sinks=self.sinks,
            alibi_slopes=self.alibi_slopes,
            num_decodes=batch.num_decodes,
            num_shared=batch.num_shared,
            deterministic=self.deterministic,
            kv_scales=self.kv_scales.of(k_cache),
        )

    def _attend_prompts(
        self, library: PromptLibrary, query: Tensor, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor | None:
        """Attends from the prompts of a batch with the library, and from its decodes with our own kernel.

        Returns:
            As `_attend`; None if the library cannot be used.
        """
        count = batch.num_decodes
        starts, slots = batch.query_start_loc[count:] - count, batch.slot_mappings[self.group][count:]
        sizes = (batch.longest_prompt, self.scale, self.window)
        prompts = library.attend(query[count:], (k_cache, v_cache), slots, starts, *sizes)
        if prompts is None or not count:
            return prompts
        return torch.cat((self._attend(query[:count], batch.first_decodes(), k_cache, v_cache), prompts))
