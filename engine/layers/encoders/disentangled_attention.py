"""`DisentangledAttention`: self-attention over whole texts, whose scores have terms of the distances of tokens.

Letters in shapes: T tokens of the step, R rows of distances, H heads, D size of a head.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor, nn

from ....kernels import disentangled_attention
from ...batch import ForwardBatch
from ..attention import Heads
from ..input_format import InputFormat, Rows
from ..linear import LinearBase
from .distance_vectors import DistanceVectors

__all__ = ["DisentangledAttention", "DistanceTerms"]

DistanceTerms: TypeAlias = frozenset[Literal["c2p", "p2c"]]
"""The terms of scores by distance: `"c2p"` multiplies queries with keys of distances, `"p2c"` keys with queries of
distances. "c" stands for content, and "p" for position."""


class DisentangledAttention(nn.Module):
    """An attention layer of an encoder, in which distances have keys and queries too (He et al., 2020).

    Args:
        heads: The heads of this rank: H query heads, and as many key and value heads, of size D.
        qkv: The fused query, key and value projections, `[hidden_size] -> [3 * H * D]`. They project the vectors of
            distances as well.
        out: The output projection, `[H * D] -> [hidden_size]`.
        scale: Factor on the scores.
        vectors: The vectors of distances, which all layers share.
        terms: The terms of the scores by distance.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        qkv: LinearBase,
        out: LinearBase,
        scale: float,
        vectors: DistanceVectors,
        terms: DistanceTerms,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.out = out
        self.scale = scale
        self.head_dim = heads.head_dim
        self._rows = vectors.rows
        self._vectors = vectors.forward  # Not the module itself, whose weights would get the name of this layer.
        self._terms = terms
        self._distances: tuple[Tensor | None, Tensor | None] | None = None

    @property
    def input_format(self) -> InputFormat:
        """The form in which the layer reads its input."""
        return self.qkv.input_format

    def pack(self) -> None:
        """Projects the vectors of distances, once for all steps. It is called after loading (`Decoder.pack`)."""
        self._distances = self._project_distances()

    def forward(self, hidden: Rows, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attends from each token of a step to all tokens of its text; the arguments are those of `EncoderAttention`.

        Returns:
            `[T, hidden_size]`. When ranks share the heads, this is one addend: the result is the sum over the ranks.
        """
        query, key, value = self._project(hidden)
        row_keys, row_queries = self._distances or self._project_distances()
        attended = disentangled_attention(
            query,
            key,
            value,
            row_keys,
            row_queries,
            self._rows,
            batch.query_start_loc,
            batch.longest_prompt or len(query),
            scale=self.scale,
        )
        return self.out(attended.flatten(1))

    def _project(self, hidden: Rows) -> tuple[Tensor, ...]:
        """Returns queries, keys and values, each `[T, H, D]`."""
        return self.qkv(hidden).unflatten(-1, (3, -1, self.head_dim)).unbind(1)

    def _project_distances(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the keys and the queries of distances, each `[R, H, D]`, or None for a term that there is not."""
        queries, keys, _ = self._project(self._vectors())
        return (keys if "c2p" in self._terms else None, queries if "p2c" in self._terms else None)
