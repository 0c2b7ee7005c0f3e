"""The tensors of one forward pass: what the model runner hands to a model.

It holds what the model reads and nothing of who asked for it: requests, sampling and scheduling are elsewhere. It is
passed as an argument everywhere; there is no current batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

__all__ = ["ForwardBatch", "GivenEmbeddings", "KVCache"]

KVCache: TypeAlias = list[tuple[Tensor, Tensor]]
"""Pairs (k_cache, v_cache), each `[num_blocks, num_kv_heads, block_size, head_dim]` in the model's dtype.

Layer j of every group of layers uses pair j: its blocks are those of the group's block table.
"""


@dataclass(frozen=True, slots=True)
class GivenEmbeddings:
    """The embeddings of some tokens of a step, which come from a prompt and not from the model's table.

    Attributes:
        indices: `[num_given]` int64, which rows of the step they are.
        values: `[num_given, embedding_size]` in the model's dtype.
    """

    indices: Tensor
    values: Tensor

    def replace_in(self, embeddings: Tensor) -> Tensor:
        """Returns `[num_tokens, embedding_size]` embeddings with these rows in place of those that were looked up."""
        return embeddings.index_copy(0, self.indices, self.values)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step, sequence after sequence, and where their keys and values live.

    The tokens of sequence b are the rows `query_start_loc[b]:query_start_loc[b + 1]`, and they are the last tokens of
    that sequence so far. A whole prompt, a chunk of one and a decoded token differ only in how many rows they are.

    A batch may be padded to a size: a sequence of padding has one token of id 0 at position 0, slot -1 (its key and
    value are not stored) and length 0 (it attends to nothing). What the model gives for it means nothing.

    Attributes:
        token_ids: `[num_tokens]` int64; where embeddings are given, the id is a placeholder.
        positions: `[num_tokens]` int64, the index of each token in its sequence.
        slot_mappings: For each group of layers `[num_tokens]` int64, where each token's key and value go:
            block_id * block_size + offset.
        query_start_loc: `[num_seqs + 1]` int32, prefix sums of the number of tokens of each sequence.
        seq_lens: `[num_seqs]` int32, tokens of each sequence including those of this step.
        block_tables: For each group `[num_seqs, max_blocks]` int32, block ids in order; columns past a sequence's end,
            and columns that lie wholly before a window, are not read.
        rows: `[num_seqs]` int32, the row that each sequence owns in the runner's tables while it runs; -1 of padding.
        num_decodes: This many sequences at the front compute one token each.
        num_shared: `[1]` int32, how many leading blocks those sequences have in common in the group with full
            attention; None if too few to matter.
        given: Embeddings that replace those of their tokens; None if there are none, as in all recorded steps.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mappings: tuple[Tensor, ...]
    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: tuple[Tensor, ...]
    rows: Tensor
    num_decodes: int = 0
    num_shared: Tensor | None = None
    given: GivenEmbeddings | None = None
