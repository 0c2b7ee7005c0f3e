"""`Components`: makes the layers that a `DecoderSpec` asks for.

All choices that depend on the spec are made here, once, when the model is built. The forward passes have no branches on
the kind of model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...kernels.paged_attention import PromptLibrary
from ..errors import ConfigError
from ..layers import (
    ACTIVATIONS,
    HEAD_ACTIVATIONS,
    MLP,
    PLAIN,
    Attention,
    CacheWriter,
    ClampAndStore,
    ClassHead,
    ConvBlock,
    DisentangledAttention,
    DistanceBias,
    DistanceVectors,
    EncoderAttention,
    ExpertMLP,
    Experts,
    ExpertsLayer,
    FeedForward,
    GatedMLP,
    HeadLayerNorm,
    HeadNorm,
    Heads,
    InputFormat,
    KVScales,
    LatentAttention,
    LayerNorm,
    LayerNormPerHead,
    LearnedPositions,
    LinearBase,
    MixerBlock,
    MLPBlock,
    NoNorm,
    NoPositions,
    Norm,
    NormAndStore,
    NoTokenTypes,
    ParallelBlock,
    PlainMLP,
    PostNormBlock,
    PreNormBlock,
    ProjectionNorm,
    Reduce,
    RelativeBias,
    RMSNorm,
    RotateAndStore,
    Router,
    SandwichBlock,
    Scale,
    ScaleAndStore,
    SharedTokenEmbedding,
    Softcap,
    StoreOnly,
    TextConv,
    TokenEmbedding,
    TokenMixer,
    TokenTypes,
    rotary_table,
)
from ..lora.embedding import AdaptedEmbedding
from ..parallel.context import ParallelContext
from ..parallel.shard import Shard
from ..quantization.group_embedding import GroupEmbedding
from .latent import make_latent_attention
from .linear_factory import LinearFactory
from .options import ModelOptions
from .pp_stages import cache_groups
from .spec import ConvSpec, DecoderSpec, ExpertsSpec, QueryGrowth, RopeSpec
from .state_components import make_state_mixer

__all__ = ["Components"]

Block: TypeAlias = PreNormBlock | PostNormBlock | SandwichBlock | ParallelBlock | MixerBlock | MLPBlock
"""Any decoder layer."""


class Components:
    """Makes the modules of one decoder. The memory of their parameters is not initialised.

    Args:
        spec: Description of the decoder.
        dtype: Number type of the parameters.
        device: Device of the parameters.
        options: The user's options for the model.
        parallel: The place of this rank among all ranks, which decides its part of every matrix.

    Attributes:
        linears: Factory of the linear layers.
        relative_bias: The learned amounts that all attention layers add to their scores by distance; None for none.
        distance_vectors: The learned vectors of which all attention layers make keys and queries of distances; None
            for none.
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
        self.linears = LinearFactory(options, dtype, device)
        self._dtype = dtype
        self._device = device
        self._library = self._choose_library()
        self._rotary_tables: dict[RopeSpec, Tensor] = {}
        self._group_of = {layer: index for index, group in enumerate(cache_groups(spec)) for layer in group.layers}
        self.relative_bias = self._relative_bias()
        self.distance_vectors = self._distance_vectors()

    def embed_tokens(self) -> TokenEmbedding | SharedTokenEmbedding | GroupEmbedding:
        """Makes the token embedding; with tensor parallelism, only this rank's rows of its table."""
        spec, parallel = self._spec, self._parallel
        rows = parallel.shard(spec.vocab_size)
        if (table := self.linears.make_table("embed_tokens", spec.embedding_size, rows)) is not None:
            reduce = self._reduce(sums=True)
            return GroupEmbedding(table, rows, reduce, scale=spec.embedding_scale, dtype=self._dtype)
        if parallel.tp_size == 1:
            return TokenEmbedding(
                spec.vocab_size,
                spec.embedding_size,
                scale=spec.embedding_scale,
                dtype=self._dtype,
                device=self._device,
            )
        return SharedTokenEmbedding(
            rows,
            spec.embedding_size,
            parallel.all_reduce,
            scale=spec.embedding_scale,
            dtype=self._dtype,
            device=self._device,
        )

    def adapted_embedding(
        self, embed_tokens: TokenEmbedding | SharedTokenEmbedding | GroupEmbedding
    ) -> TokenEmbedding | SharedTokenEmbedding | GroupEmbedding | AdaptedEmbedding:
        """Makes the token embedding of the first pp stage, which adapters change, from the one of all tokens."""
        spec, slots = self._spec, self.linears.adapters
        if slots is None:
            return embed_tokens
        return AdaptedEmbedding(
            embed_tokens,
            spec.vocab_size,
            spec.embedding_size,
            scale=spec.embedding_scale,
            slots=slots,
            dtype=self._dtype,
            device=self._device,
        )

    def input_scale(self) -> Scale | nn.Identity:
        """Makes the module that scales embeddings, given ones too; an identity if the model has no such factor."""
        return _scale(self._spec.input_scale)

    def positions(self) -> LearnedPositions | NoPositions:
        """Makes the table of learned positions, or a module that adds nothing if the model has no learned positions."""
        spec = self._spec
        if spec.position_offset is None:
            return NoPositions()
        return LearnedPositions(
            spec.max_position_embeddings,
            self._placed_size,
            offset=spec.position_offset,
            dtype=self._dtype,
            device=self._device,
        )

    def token_types(self) -> TokenTypes | NoTokenTypes:
        """Makes the table of the types of tokens, or a module that adds nothing if the model has no types."""
        return self._types(self._spec.num_token_types)

    def tasks(self) -> TokenTypes | NoTokenTypes:
        """Makes the table of tasks, which are types of tokens too, or a module that adds nothing if there are none."""
        return self._types(self._spec.num_tasks)

    def _types(self, count: int) -> TokenTypes | NoTokenTypes:
        if not count:
            return NoTokenTypes()
        return TokenTypes(count, self._placed_size, dtype=self._dtype, device=self._device)

    def embedding_norm(self) -> Norm:
        """Makes the norm after the embedding; if the model has none, a module that changes nothing."""
        return self._norm(sums=False, size=self._placed_size) if self._spec.embedding_norm else NoNorm()

    @property
    def _placed_size(self) -> int:
        """Width of the vectors to which positions and types are added."""
        spec = self._spec
        return spec.hidden_size if spec.projection == "first" else spec.embedding_size

    def input_projection(self) -> LinearBase | nn.Identity:
        """Makes the projection of the rows of the token embedding, of a model whose projection comes first."""
        return self._projection("project_in", self._spec.embedding_size, self._placed_size)

    def normed_projection(self) -> LinearBase | nn.Identity:
        """Makes the projection of the normed embeddings, of a model whose projection comes last."""
        if self._spec.projection == "first":
            return nn.Identity()
        return self.linears.make_linear("project_normed", self._placed_size, self._spec.hidden_size, bias=True)

    def _summed(self, name: str, in_features: Shard, out_features: int, *, bias: bool) -> LinearBase:
        """Makes a linear layer of partial results, which the next norm sums over ranks. Only tp_rank 0 has the bias."""
        return self.linears.make_linear(name, in_features, out_features, bias=bias and self._parallel.tp_rank == 0)

    def output_projection(self) -> LinearBase | nn.Identity:
        """Makes the projection of hidden states to the width of the token embedding, if the input has one as well."""
        return self._projection("project_out", self._spec.hidden_size, self._spec.output_size)

    def _projection(self, name: str, in_features: int, out_features: int) -> LinearBase | nn.Identity:
        """Makes a projection between two widths, or an identity if they are equal."""
        if in_features == out_features:
            return nn.Identity()
        return self.linears.make_linear(name, in_features, out_features, bias=False)

    def final_norm(self) -> Norm:
        """Makes the norm after the last layer; if the model has none, a module that only adds the residual."""
        return self._norm(sums=self._ends_in_addends) if self._spec.final_norm else self.stage_total()

    def stage_total(self) -> NoNorm:
        """Makes the module that adds up what the last layer of a pp stage returns."""
        return NoNorm(reduce=self._reduce(sums=self._ends_in_addends))

    @property
    def _ends_in_addends(self) -> bool:
        """Whether a layer returns one addend of its result on each rank: only a network with no norm after it does."""
        return self._spec.norm_placement == "before"

    def _norm(self, *, sums: bool, output: InputFormat = PLAIN, size: int | None = None) -> Norm:
        """Makes a norm of the residual stream, which first sums its input over the ranks if `sums` is true.

        `output` is the form of the normed rows, if they go to one layer alone; a `LayerNorm` writes only plain rows.
        `size` is the width of the rows, if it is not that of the residual stream.
        """
        spec, dtype, device, reduce = self._spec, self._dtype, self._device, self._reduce(sums=sums)
        width = size or spec.hidden_size
        if spec.rms_norm:
            return RMSNorm(
                width,
                eps=spec.norm_eps,
                unit_offset=spec.norm_unit_offset,
                dtype=dtype,
                device=device,
                reduce=reduce,
                output=output,
            )
        return LayerNorm(
            width,
            eps=spec.norm_eps,
            affine=spec.norm_affine,
            unit_offset=spec.norm_unit_offset,
            bias=spec.norm_bias,
            dtype=dtype,
            device=device,
            reduce=reduce,
        )

    def _reduce(self, *, sums: bool) -> Reduce | None:
        return self._parallel.all_reduce if sums and self._parallel.tp_size > 1 else None

    def head(self, embed_tokens: TokenEmbedding | SharedTokenEmbedding | GroupEmbedding | None) -> LinearBase:
        """Makes the output head, which computes this rank's columns of the logits.

        Args:
            embed_tokens: The token embedding whose table the head uses; None for a head with weights of its own.
        """
        spec = self._spec
        rows = self._parallel.shard(spec.vocab_size)
        if isinstance(embed_tokens, GroupEmbedding):
            return self.linears.make_tied_group("lm_head", spec.embedding_size, rows, embed_tokens.table)
        if embed_tokens is not None:
            return self.linears.make_tied("lm_head", spec.embedding_size, rows, embed_tokens.weight)
        return self.linears.make_linear("lm_head", spec.embedding_size, rows, bias=spec.head_bias)

    def logit_adjustment(self) -> Softcap | Scale | nn.Identity:
        """Makes the module that limits the logits of tokens smoothly or scales them; an identity if neither is done."""
        return Softcap(self._spec.logit_softcap) if self._spec.logit_softcap else _scale(self._spec.logit_scale)

    def score(self) -> LinearBase | ClassHead:
        """Makes the head of a classifier; every rank of the last pp stage has the whole head."""
        head, size, make_linear = self._spec.class_head, self._spec.output_size, self.linears.make_linear
        if not head.activation:
            return make_linear("score", size, self._spec.num_labels, bias=head.bias)
        return ClassHead(
            make_linear("score.dense", size, size, bias=head.dense_bias),
            HEAD_ACTIVATIONS[head.activation],
            self._norm(sums=False) if head.norm else NoNorm(),
            make_linear("score.out", size, self._spec.num_labels, bias=head.bias),
        )

    def block(self, layer_idx: int, *, is_first: bool) -> Block:
        """Makes a layer: attention, feed-forward network and the norms around them.

        Args:
            layer_idx: Index of the layer among those that have weights of their own.
            is_first: Whether it is the first layer of a pp stage, whose input is complete on every rank.
        """
        if self._spec.mlp_layers is not None:
            return self._single_block(layer_idx, is_first=is_first)
        attention, mlp = self._mixer(layer_idx), self._mlp(layer_idx)
        to_attention, to_mlp = attention.input_format, mlp.input_format
        if self._spec.norm_placement == "after":
            parts = (attention, mlp, self._norm(sums=True), self._norm(sums=True))
            conv = self._spec.first_conv if layer_idx == 0 else None
            if conv is None:
                return PostNormBlock(*parts)
            return ConvBlock(*parts, conv=self._text_conv(conv), conv_norm=self._norm(sums=False))
        if self._spec.norm_placement in ("output", "both"):
            is_both = self._spec.norm_placement == "both"
            return SandwichBlock(
                attention,
                mlp,
                attention_norm=self._norm(sums=False, output=to_attention) if is_both else NoNorm(),
                attention_out_norm=self._norm(sums=True),
                mlp_norm=self._norm(sums=False, output=to_mlp) if is_both else NoNorm(),
                mlp_out_norm=self._norm(sums=True),
            )
        # The other layers follow a feed-forward network, of whose result every rank has one addend.
        if self._spec.parallel:
            attention_norm = self._norm(sums=not is_first)
            return ParallelBlock(
                attention, mlp, attention_norm, None if self._spec.shared_norm else self._norm(sums=False)
            )
        has_norm = layer_idx > 0 or self._spec.first_norm
        attention_norm = self._norm(sums=not is_first, output=to_attention) if has_norm else NoNorm()
        mlp_norm, residual_scale = self._norm(sums=True, output=to_mlp), _scale(self._spec.residual_scale)
        return PreNormBlock(attention, mlp, attention_norm, mlp_norm, residual_scale=residual_scale)

    def _text_conv(self, conv: ConvSpec) -> TextConv:
        if self._options.deterministic:
            raise ConfigError(
                "deterministic=True is not supported for models with a convolution over the tokens of a text: the "
                "order of its sums may depend on the batch; leave it out"
            )
        activation, size = HEAD_ACTIVATIONS[conv.activation], self._spec.hidden_size
        return TextConv(size, conv.width, conv.groups, activation, dtype=self._dtype, device=self._device)

    def _single_block(self, layer_idx: int, *, is_first: bool) -> MixerBlock | MLPBlock:
        """Makes a decoder layer of one sublayer; of the result of the layer before, every rank has one addend."""
        if self._spec.has_mixer(layer_idx):
            attention = self._mixer(layer_idx)
            return MixerBlock(attention, self._norm(sums=not is_first, output=attention.input_format))
        mlp = self._mlp(layer_idx)
        return MLPBlock(mlp, self._norm(sums=not is_first, output=mlp.input_format))

    def _mixer(self, layer_idx: int) -> TokenMixer:
        """Makes the sublayer in which tokens see others: attention, or a recurrence."""
        if self._spec.state is None or layer_idx not in self._spec.state.layers:
            return self._attention(layer_idx)
        made_by = (self._spec, self.linears, self._summed, self._parallel, self._options)
        name = f"layers.{layer_idx}.attention"
        return make_state_mixer(name, *made_by, dtype=self._dtype, device=self._device)

    def _attention(self, layer_idx: int) -> Attention | LatentAttention | EncoderAttention | DisentangledAttention:
        spec, parallel = self._spec, self._parallel
        if spec.is_encoder:
            return self._encoder_attention(layer_idx)
        if spec.latent is not None:
            return self._latent_attention(layer_idx, spec.latent.value_dim)
        heads, kv_heads = parallel.shard(spec.num_heads), parallel.kv_shard(spec.num_kv_heads)
        query, kv = heads.times(spec.head_dim), kv_heads.times(spec.head_dim)
        name, blocks = f"layers.{layer_idx}.attention", {"query": query, "key": kv, "value": kv}
        if spec.attention.output_gate:
            blocks["gate"] = query
        return Attention(
            Heads(heads, kv_heads.length, spec.head_dim, heads.length if spec.attention.output_gate else 0),
            qkv=self.linears.make_linear(f"{name}.qkv", spec.hidden_size, blocks, bias=spec.qkv_bias),
            out=self._summed(f"{name}.out", query, spec.hidden_size, bias=spec.attention_out_bias),
            rotate_and_store=self._rotate_and_store(layer_idx),
            kv_scales=KVScales(kv_heads, self._device),
            scale=spec.attention_scale(layer_idx),
            softcap=spec.attention.softcap,
            causal=spec.attention.causal,
            sinks=self._device if spec.attention.sinks else None,
            alibi_slopes=self._alibi_slopes(heads),
            window=spec.windows[layer_idx],
            group=self._group_of[layer_idx],
            deterministic=self._options.deterministic,
            library=self._library,
        )

    def _encoder_attention(self, layer_idx: int) -> EncoderAttention | DisentangledAttention:
        spec, parallel, name = self._spec, self._parallel, f"layers.{layer_idx}.attention"
        heads, kv_heads = parallel.shard(spec.num_heads), parallel.kv_shard(spec.num_kv_heads)
        query, kv = heads.times(spec.head_dim), kv_heads.times(spec.head_dim)
        blocks = {"query": query, "key": kv, "value": kv}
        made: dict[str, Any] = {
            "qkv": self.linears.make_linear(f"{name}.qkv", spec.hidden_size, blocks, bias=spec.qkv_bias),
            "out": self._summed(f"{name}.out", query, spec.hidden_size, bias=spec.attention_out_bias),
            "scale": spec.attention_scale(layer_idx),
        }
        sizes, distances = Heads(heads, kv_heads.length, spec.head_dim), spec.attention.distances
        if distances is not None:
            assert self.distance_vectors is not None
            return DisentangledAttention(sizes, vectors=self.distance_vectors, terms=distances.terms, **made)
        rotate = self._rotate_and_store(layer_idx)
        return EncoderAttention(
            sizes,
            **made,
            rotate_and_store=None if isinstance(rotate, StoreOnly) else rotate,
            softcap=spec.attention.softcap,
            window=spec.windows[layer_idx],
            distance_bias=self._distance_bias(heads),
        )

    def _relative_bias(self) -> RelativeBias | None:
        bias = self._spec.attention.relative_bias
        if bias is None:
            return None
        heads = self._parallel.shard(self._spec.num_heads)
        return RelativeBias(heads, bias.num_buckets, bias.max_distance, dtype=self._dtype, device=self._device)

    def _distance_vectors(self) -> DistanceVectors | None:
        distances = self._spec.attention.distances
        if distances is None:
            return None
        if self.linears.adapters is not None:
            raise ConfigError(
                "enable_lora=True is not supported for models with keys and queries of distances (DeBERTa): adapters "
                "would change them too; merge the adapter into the model, or leave enable_lora out"
            )
        return DistanceVectors(
            self._spec.hidden_size,
            distances.max_distance,
            distances.num_buckets,
            norm=self._norm(sums=False) if distances.norm else NoNorm(),
            dtype=self._dtype,
            device=self._device,
        )

    def _distance_bias(self, heads: Shard) -> DistanceBias | None:
        """Returns what gives the amounts by distance of an encoder: learned, or those of ALiBi; None for none."""
        if self.relative_bias is not None:
            return self.relative_bias.forward
        slopes = self._alibi_slopes(heads)
        if slopes is None:
            return None
        most = self._options.max_model_len or self._spec.max_position_embeddings
        distances = torch.arange(1 - most, most, dtype=torch.float32, device=self._device).abs()
        table = -slopes[:, None] * distances
        return lambda: table

    def _alibi_slopes(self, heads: Shard) -> Tensor | None:
        slopes = self._spec.attention.alibi_slopes[heads.start : heads.start + heads.length]
        return torch.tensor(slopes, dtype=torch.float32, device=self._device) if slopes else None

    def _latent_attention(self, layer_idx: int, value_dim: int) -> LatentAttention:
        spec, parallel, name = self._spec, self._parallel, f"layers.{layer_idx}.attention"
        assert spec.rope is not None, "a part of a latent is rotated"
        if self._options.deterministic:
            raise ConfigError(
                "deterministic=True is not supported for models whose keys and values are made of latents yet: the "
                "order of their sums depends on the batch; leave it out"
            )
        values = parallel.shard(spec.num_heads).times(value_dim)
        return make_latent_attention(
            name,
            spec,
            parallel,
            self.linears,
            out=self._summed(f"{name}.out", values, spec.hidden_size, bias=spec.attention_out_bias),
            table=self._rotary_table(spec.rope),
            group=self._group_of[layer_idx],
            dtype=self._dtype,
            device=self._device,
        )

    def _choose_library(self) -> PromptLibrary | None:
        """Returns the library for prompts, one for all layers; None if it is not used."""
        form = self._spec.attention
        return PromptLibrary.choose(
            self._device,
            self._dtype,
            self._spec.head_dim,
            softcap=form.softcap,
            sinks=form.sinks,
            alibi=bool(form.alibi_slopes),
            causal=form.causal,
            deterministic=self._options.deterministic,
        )

    def _rotate_and_store(self, layer_idx: int) -> CacheWriter:
        spec, parallel, rope = self._spec, self._parallel, self._spec.rope_of(layer_idx)
        store: RotateAndStore | StoreOnly = StoreOnly()
        if rope is not None:
            store = RotateAndStore(self._rotary_table(rope), *self._head_norms(), interleaved=rope.interleaved)
        if spec.qkv_limit:
            return ClampAndStore(spec.qkv_limit, store)
        if spec.attention.query_growth is not None:
            return ScaleAndStore(self._query_factors(spec.attention.query_growth), store)
        if not spec.qk_norm or spec.qk_norm_form == "head":
            return store
        query, key = parallel.shard(spec.num_heads), parallel.kv_shard(spec.num_kv_heads)
        return NormAndStore(self._norm_of_heads(query), self._norm_of_heads(key), store)

    def _query_factors(self, growth: QueryGrowth) -> Tensor:
        """Returns the factor on the queries of each position, `[max_position_embeddings]` float32."""
        positions = torch.arange(self._spec.max_position_embeddings, dtype=torch.float32, device=self._device)
        return 1 + growth.beta * (positions / growth.length).floor().log1p()

    def _norm_of_heads(self, heads: Shard) -> ProjectionNorm | HeadLayerNorm | LayerNormPerHead:
        """Makes the norm of the query heads or of the key heads of a token."""
        spec, gather = self._spec, self._parallel.all_gather if self._parallel.tp_size > 1 else None
        options: dict[str, Any] = {"eps": spec.norm_eps, "dtype": self._dtype, "device": self._device}
        if spec.qk_norm_form == "layer":
            return HeadLayerNorm(spec.head_dim, **options)
        if spec.qk_norm_form == "per head":
            return LayerNormPerHead(heads, spec.head_dim, **options)
        return ProjectionNorm(heads, spec.head_dim, gather=gather, **options)

    def _head_norms(self) -> Iterable[HeadNorm | None]:
        """Makes the weights of the norms of query and key heads, which the rotation computes; None if it does not."""
        fused = self._spec.qk_norm and self._spec.qk_norm_form == "head"
        return (self._head_norm() if fused else None for _ in range(2))

    def _head_norm(self) -> HeadNorm:
        spec = self._spec
        options: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        return HeadNorm(spec.head_dim, eps=spec.norm_eps, unit_offset=spec.norm_unit_offset, **options)

    def _rotary_table(self, rope: RopeSpec) -> Tensor:
        """Returns the cosines and sines of all positions: one tensor for all layers with the same parameters."""
        if rope not in self._rotary_tables:
            max_positions = self._spec.max_position_embeddings
            is_long = rope.is_long(self._options.max_model_len or max_positions)
            self._rotary_tables[rope] = rotary_table(
                rope.long_inv_freq if is_long else rope.inv_freq,
                scaling=rope.scaling,
                max_positions=max_positions,
                device=self._device,
            )
        return self._rotary_tables[rope]

    def _mlp(self, layer_idx: int) -> FeedForward:
        spec, name = self._spec, f"layers.{layer_idx}.mlp"
        if spec.experts is None or layer_idx not in spec.experts.layers:
            return self._dense_mlp(name, spec.intermediate_size)
        experts, make_small, shared, shared_gate = spec.experts, self.linears.make_small, None, None
        sizes = (f"{name}.router.linear", spec.hidden_size, experts.router.num_experts)
        logits = make_small(*sizes, bias=experts.router.bias, dtype=torch.float32)
        if experts.shared_size:
            shared = self._dense_mlp(f"{name}.shared", experts.shared_size)
        if experts.shared_gate:
            shared_gate = make_small(f"{name}.shared_gate", spec.hidden_size, 1)
        router = Router(logits, experts.router, device=self._device)
        return ExpertMLP(router, self._experts(f"{name}.experts", experts), shared, shared_gate)

    def _experts(self, name: str, experts: ExpertsSpec) -> Experts:
        """Makes the experts of a layer: a slice of each, or with expert parallelism whole experts."""
        parallel, num_experts, inner = self._parallel, experts.router.num_experts, experts.intermediate_size
        is_whole = self._options.expert_parallel
        layer = ExpertsLayer(
            name=name,
            own=parallel.shard(num_experts) if is_whole else Shard(num_experts),
            hidden_size=self._spec.hidden_size,
            inner=Shard(inner) if is_whole else parallel.shard(inner),
            gate=experts.gate,
            bias=experts.bias,
            adds_down_bias=is_whole or parallel.tp_rank == 0,
            dtype=self._dtype,
            device=self._device,
        )
        return self.linears.make_experts(layer)

    def _dense_mlp(self, name: str, intermediate_size: int) -> MLP:
        spec, make_linear = self._spec, self.linears.make_linear
        inner = self._parallel.shard(intermediate_size)
        down_bias = spec.mlp_bias if spec.mlp_down_bias is None else spec.mlp_down_bias
        down = self._summed(f"{name}.down", inner, spec.hidden_size, bias=down_bias)
        if spec.gated_mlp:
            blocks = {"gate": inner, "up": inner}
            gate_up = make_linear(f"{name}.gate_up", spec.hidden_size, blocks, bias=spec.mlp_bias)
            return GatedMLP(gate_up, down, down.input_format.gates[spec.activation])
        up = make_linear(f"{name}.up", spec.hidden_size, inner, bias=spec.mlp_bias)
        return PlainMLP(up, down, ACTIVATIONS[spec.activation])


def _scale(factor: float) -> Scale | nn.Identity:
    """Makes the module that multiplies by a factor; an identity if the factor is 1."""
    return nn.Identity() if factor == 1 else Scale(factor)
