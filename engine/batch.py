"""`ForwardBatch`: the tensors of one forward pass, which the model runner hands to a model.

A batch holds only tensors that the model reads; it knows no requests, no sampling and no scheduling. Every function
that needs the batch gets it as an argument; no global variable holds it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

__all__ = ["ForwardBatch", "GivenEmbeddings", "KVCache"]

KVCache: TypeAlias = list[tuple[Tensor, Tensor]]
"""Pairs (k_cache, v_cache), each `[num_blocks, num_kv_heads, block_size, head_dim]` in the model's dtype.

Layer j of every group of layers uses pair j. The block table of the group says which blocks of the pair belong to a
sequence. Where layers keep latents, `v_cache` is a view of `k_cache` (`CacheShape`).

Behind them is a pair (inputs, matrices) for each layer that keeps states in place of keys and values: the last inputs
of its convolution, and the matrices of its recurrence, with a row for each running sequence (`allocate_states`).
"""


@dataclass(frozen=True, slots=True)
class GivenEmbeddings:
    """Embeddings of some tokens of a step that a caller has given, in place of the embeddings of the model's table.

    Attributes:
        indices: `[num_given]` int64, indices of the tokens in the step's flat tensors.
        values: `[num_given, embedding_size]` in the model's dtype, the embedding of each of these tokens.
    """

    indices: Tensor
    values: Tensor

    def replace_in(self, embeddings: Tensor) -> Tensor:
        """Returns a copy of `embeddings`, `[num_tokens, embedding_size]`, with `values` in its rows `indices`."""
        return embeddings.index_copy(0, self.indices, self.values)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step, sequence after sequence, and the slots of their keys and values in the KV cache.

    The tokens of sequence b have the indices `query_start_loc[b]:query_start_loc[b + 1]` in the flat tensors. They are
    the latest tokens of the sequence. A whole prompt, a chunk of a prompt and a decoded token differ only in the number
    of tokens.

    A batch may be padded to a size. A sequence of padding has one token of id 0 at position 0, slot -1 (its key and
    value are not stored) and length 0 (it attends to no token). The model's output for padding has no meaning.

    Attributes:
        token_ids: `[num_tokens]` int64, the token ids, with a placeholder where an embedding is given.
        positions: `[num_tokens]` int64, the index of each token in its sequence.
        slot_mappings: For each group of layers `[num_tokens]` int64, the slot that each token's key and value are
            stored in: block_id * block_size + offset.
        query_start_loc: `[num_seqs + 1]` int32, prefix sums of the number of tokens of each sequence.
        seq_lens: `[num_seqs]` int32, number of tokens of each sequence, the tokens of this step included.
        block_tables: For each group `[num_seqs, max_blocks]` int32, block ids in order. Columns past a sequence's end,
            and columns that lie wholly before a window, are not read.
        rows: `[num_seqs]` int32, the row that each sequence owns in the runner's tables while it runs; -1 for padding.
        num_decodes: Number of sequences at the front that compute one token each.
        num_shared: `[1]` int32, number of leading blocks that the first `num_decodes` sequences have in common in the
            group with full attention; None if the common blocks are too few to make attention faster.
        given: Embeddings that callers have given for some tokens; None if there are none, as in all recorded steps.
        longest_prompt: Number of tokens of the longest sequence after the decodes, if all of these have no cached
            context, so that they attend only to their own tokens in this step; else 0.
        token_types: `[num_tokens]` int64, the type of each token; None if all have type 0.
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
    longest_prompt: int = 0
    token_types: Tensor | None = None

    def first_decodes(self) -> ForwardBatch:
        """Returns the batch of the first `num_decodes` sequences alone."""
        count = self.num_decodes
        return replace(
            self,
            query_start_loc=self.query_start_loc[: count + 1],
            seq_lens=self.seq_lens[:count],
            block_tables=tuple(table[:count] for table in self.block_tables),
        )
