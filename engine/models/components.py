"""Chooses the layers a `DecoderSpec` asks for: the one place where a field of the spec becomes a component.

Every choice falls here, once, at construction; the forward passes have no branch on the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers import (
    ACTIVATIONS,
    GATES,
    MLP,
    Attention,
    Fp8Linear,
    GatedMLP,
    Heads,
    Int8Linear,
    InvariantLinear,
    LayerNorm,
    LearnedPositions,
    Linear,
    NoNorm,
    NoPositions,
    Norm,
    PlainMLP,
    PostNormBlock,
    PreNormBlock,
    Reduce,
    RMSNorm,
    RotateAndStore,
    SharedTokenEmbedding,
    StoreOnly,
    TokenEmbedding,
    rotary_table,
)
from ..parallel.context import ParallelContext
from ..parallel.shard import Dimension, Shard, as_shard
from .options import ModelOptions
from .spec import DecoderSpec
from .stages import cache_groups

__all__ = ["Components"]

_FP8_MULTIPLE = 16
"""What the sizes of a product of 8-bit floats must be multiples of on a GPU."""


class Components:
    """Makes the parts of one decoder. Memory of their parameters is not initialised.

    Args:
        spec: The decoder.
        dtype: Of all parameters.
        device: Of all parameters.
        options: What the user chooses about it.
        parallel: This rank: it gets its part of every matrix that its stage shares.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        dtype: torch.dtype,
        device: torch.device,
        options: ModelOptions,
        parallel: ParallelContext,
    ) -> None:
        self._spec = spec
        self._parallel = parallel
        self._options = options
        self._full_linear = InvariantLinear if options.deterministic else Linear
        self._dtype = dtype
        self._device = device
        self._rotary_table = self._make_rotary_table()
        self._group_of = {layer: index for index, group in enumerate(cache_groups(spec)) for layer in group.layers}

    def embed_tokens(self) -> TokenEmbedding | SharedTokenEmbedding:
        """Makes the token embedding."""
        spec, parallel = self._spec, self._parallel
        if parallel.tp_size == 1:
            return TokenEmbedding(spec.vocab_size, spec.embedding_size, dtype=self._dtype, device=self._device)
        rows = parallel.shard(spec.vocab_size)
        return SharedTokenEmbedding(
            rows, spec.embedding_size, parallel.all_reduce, dtype=self._dtype, device=self._device
        )

    def positions(self) -> LearnedPositions | NoPositions:
        """Makes the learned positions, if there are any."""
        spec = self._spec
        if spec.position_offset is None:
            return NoPositions()
        return LearnedPositions(
            spec.max_position_embeddings,
            spec.hidden_size,
            offset=spec.position_offset,
            dtype=self._dtype,
            device=self._device,
        )

    def linear(
        self, in_features: Dimension, out_features: Dimension | Mapping[str, Dimension], *, bias: bool
    ) -> Linear:
        """Makes a linear layer of the decoder: of 8 bits if that was asked for and its sizes allow it."""
        blocks = out_features.values() if isinstance(out_features, Mapping) else (out_features,)
        kind = self._linear_kind(as_shard(in_features).length, sum(as_shard(rows).length for rows in blocks))
        return kind(in_features, out_features, bias=bias, dtype=self._dtype, device=self._device)

    def _summed(self, in_features: Shard, out_features: int, *, bias: bool) -> Linear:
        """Makes a linear layer whose results the next norm adds up over the stage: one rank of it has the bias."""
        return self.linear(in_features, out_features, bias=bias and self._parallel.tp_rank == 0)

    def _linear_kind(self, in_features: int, rows: int) -> type[Linear]:
        quantization = self._options.quantization
        if quantization == "fp8" and in_features % _FP8_MULTIPLE == rows % _FP8_MULTIPLE == 0:
            return Fp8Linear
        if quantization == "int8" and Int8Linear.takes(in_features):
            return Int8Linear
        return self._full_linear

    def projection(self, in_features: int, out_features: int) -> Linear | nn.Identity:
        """Makes a projection between two widths, or nothing between equal ones."""
        return nn.Identity() if in_features == out_features else self.linear(in_features, out_features, bias=False)

    def final_norm(self) -> Norm:
        """Makes what follows the last layer: a norm, or else what adds the residual in its place."""
        sums = not self._spec.post_norm
        return self._norm(sums=sums) if self._spec.final_norm else NoNorm(reduce=self._reduce(sums=sums))

    def _norm(self, *, sums: bool) -> Norm:
        """Makes a norm of the residual stream, which adds up the ranks' parts where it follows a sublayer (`sums`)."""
        spec, dtype, device, reduce = self._spec, self._dtype, self._device, self._reduce(sums=sums)
        if spec.rms_norm:
            return RMSNorm(spec.hidden_size, eps=spec.norm_eps, dtype=dtype, device=device, reduce=reduce)
        return LayerNorm(
            spec.hidden_size, eps=spec.norm_eps, affine=spec.norm_affine, dtype=dtype, device=device, reduce=reduce
        )

    def _reduce(self, *, sums: bool) -> Reduce | None:
        return self._parallel.all_reduce if sums and self._parallel.tp_size > 1 else None

    def head(self, embed_tokens: TokenEmbedding | SharedTokenEmbedding | None) -> Linear:
        """Makes the output head, never of 8 bits; a tied one is the embedding's own table.

        Args:
            embed_tokens: The embedding to be tied to; None for a head of its own.
        """
        spec = self._spec
        # A tied head brings no memory of its own: made on no device, it is given the embedding's.
        device = self._device if embed_tokens is None else torch.device("meta")
        rows = self._parallel.shard(spec.vocab_size)
        head = self._full_linear(spec.embedding_size, rows, bias=False, dtype=self._dtype, device=device)
        if embed_tokens is not None:
            head.weight = embed_tokens.weight
        return head

    def score(self) -> Linear:
        """Makes the head of a classifier, never of 8 bits; every rank of the last stage has all of it."""
        spec = self._spec
        return self._full_linear(
            spec.embedding_size, spec.num_labels, bias=False, dtype=self._dtype, device=self._device
        )

    def block(self, layer_idx: int) -> PreNormBlock | PostNormBlock:
        """Makes one decoder layer."""
        attention, mlp = self._attention(layer_idx), self._mlp()
        if self._spec.post_norm:
            return PostNormBlock(attention, mlp, self._norm(sums=True), self._norm(sums=True))
        # The first layer follows the embedding, which every rank has whole; the others follow a feed-forward network.
        return PreNormBlock(attention, mlp, self._norm(sums=layer_idx > 0), self._norm(sums=True))

    def _attention(self, layer_idx: int) -> Attention:
        spec, parallel = self._spec, self._parallel
        heads, kv_heads = parallel.shard(spec.num_heads), parallel.kv_shard(spec.num_kv_heads)
        query, kv = heads.times(spec.head_dim), kv_heads.times(spec.head_dim)
        return Attention(
            Heads(heads.length, kv_heads.length, spec.head_dim),
            qkv=self.linear(spec.hidden_size, {"query": query, "key": kv, "value": kv}, bias=spec.qkv_bias),
            out=self._summed(query, spec.hidden_size, bias=spec.attention_out_bias),
            rotate_and_store=self._rotate_and_store(),
            window=spec.windows[layer_idx],
            group=self._group_of[layer_idx],
            deterministic=self._options.deterministic,
        )

    def _rotate_and_store(self) -> RotateAndStore | StoreOnly:
        if self._rotary_table is None:
            return StoreOnly()
        return RotateAndStore(self._rotary_table, self._head_norm(), self._head_norm())

    def _head_norm(self) -> RMSNorm | None:
        spec = self._spec
        if not spec.qk_norm:
            return None
        return RMSNorm(spec.head_dim, eps=spec.norm_eps, dtype=self._dtype, device=self._device)

    def _make_rotary_table(self) -> Tensor | None:
        spec = self._spec
        if spec.rope is None:
            return None
        return rotary_table(
            spec.rope.inv_freq,
            scaling=spec.rope.scaling,
            max_positions=spec.max_position_embeddings,
            device=self._device,
        )

    def _mlp(self) -> MLP:
        spec = self._spec
        inner = self._parallel.shard(spec.intermediate_size)
        down = self._summed(inner, spec.hidden_size, bias=spec.mlp_bias)
        if spec.gated_mlp:
            gate_up = self.linear(spec.hidden_size, {"gate": inner, "up": inner}, bias=spec.mlp_bias)
            return GatedMLP(gate_up, down, GATES[spec.activation])
        up = self.linear(spec.hidden_size, inner, bias=spec.mlp_bias)
        return PlainMLP(up, down, ACTIVATIONS[spec.activation])
