"""`DecoderSpec`: a decoder-only model as data, with every field in which supported models differ.

A family (`families/*.py`) turns a Hugging Face config into a `DecoderSpec`; `components.py` turns a spec into layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import UnsupportedModelError
from ..layers import DistanceTerms
from ..layers.router import RouterSpec

__all__ = [
    "AttentionSpec",
    "ClassPooling",
    "ConvSpec",
    "DecoderSpec",
    "DistanceSpec",
    "ExpertsSpec",
    "HeadSpec",
    "LatentSpec",
    "QueryGrowth",
    "RelativeBiasSpec",
    "RopeSpec",
    "StateSpec",
]


ClassPooling: TypeAlias = Literal["LAST", "CLS", "MEAN"]
"""The vector of a text that a classifier reads: the hidden state of its last or first token, or the mean of all."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Parameters of rotary positions.

    Attributes:
        inv_freq: Radians per position of each rotated pair of a head, already scaled for long contexts. The pairs are
            of the first `2 * len(inv_freq)` numbers of a head; the others are not rotated. It is empty for a layer
            without rotary positions in a model whose heads are normed, because the rotation computes these norms.
        scaling: Factor on cosine and sine.
        long_inv_freq: The same as `inv_freq`, for engines whose sequences may have more than `num_short_positions`
            tokens; empty for a model that has only one list.
        num_short_positions: Most tokens of a sequence for which `inv_freq` is made, if there is `long_inv_freq`.
        interleaved: Whether neighbouring numbers of a head are rotated as a pair, not the numbers of its two halves.
    """

    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    long_inv_freq: tuple[float, ...] = ()
    num_short_positions: int = 0
    interleaved: bool = False

    def is_long(self, max_model_len: int) -> bool:
        """Returns whether an engine with sequences of up to `max_model_len` tokens uses `long_inv_freq`."""
        return bool(self.long_inv_freq) and max_model_len > self.num_short_positions


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """A factor on queries that grows with their position p: `1 + beta * log(1 + floor(p / length))`.

    This is the temperature tuning of Llama 4 and Ministral 3, for contexts longer than those of the training.

    Attributes:
        beta: How fast the factor grows.
        length: Number of leading positions whose factor is 1.
    """

    beta: float
    length: int


@dataclass(frozen=True, slots=True)
class RelativeBiasSpec:
    """A learned amount that is added to the score of a query and a key, by their distance, in all layers of an encoder.

    Distances are put into buckets: each small distance has its own, larger ones share theirs with others, on a
    logarithmic scale, and half of the buckets are for keys after the query (Raffel et al., 2020, arXiv:1910.10683).

    Attributes:
        num_buckets: Number of buckets, each with an amount for every head.
        max_distance: Distance from which on all keys are in the last bucket.
    """

    num_buckets: int
    max_distance: int


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """A convolution over the input of the first layer of an encoder, which is added to the result of that layer.

    Attributes:
        width: Number of tokens that a token sees, itself in the middle; an odd number.
        groups: Number of groups of channels, each of which sees only itself.
        activation: Key of `layers.HEAD_ACTIVATIONS`, after the convolution.
    """

    width: int
    groups: int
    activation: str


@dataclass(frozen=True, slots=True)
class DistanceSpec:
    """Learned vectors of distances, of which all layers of an encoder make keys and queries as of tokens.

    This is the disentangled attention of DeBERTa (He et al., 2020, arXiv:2006.03654).

    Attributes:
        max_distance: Distance from which on all tokens on the same side have the same vector.
        num_buckets: Number of vectors for each side, on a logarithmic scale; None for one for each distance.
        terms: The terms of the scores by distance.
        norm: Whether the vectors are normed.
    """

    max_distance: int
    num_buckets: int | None
    terms: DistanceTerms
    norm: bool


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The head of a classifier: which vector it reads, and its layers. Only `Decoder.score` has such a head.

    Attributes:
        pooling: The vector of a text that is classified: `"LAST"` is the hidden state of its last token, `"CLS"` that
            of its first one, `"MEAN"` the mean of all. A head that classifies every token does not ask.
        activation: Key of `layers.HEAD_ACTIVATIONS`, after a first linear layer `[embedding_size] -> [embedding_size]`;
            empty for a head without that layer.
        dense_bias: Whether the first layer has a bias.
        norm: Whether a norm follows the activation.
        bias: Whether the last layer, whose rows are the classes, has a bias.
        scale: Factor on the logits.
    """

    pooling: ClassPooling = "LAST"
    activation: str = ""
    dense_bias: bool = True
    norm: bool = False
    bias: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Parameters of the attention scores, equal in all layers. Windows, which may differ, are `DecoderSpec.windows`.

    Attributes:
        scale: Factor on the product of a query and a key; None for `head_dim ** -0.5`.
        scaled_by_layer: Whether the factor is divided by the number of the layer, from 1.
        softcap: Smooth limit on the scores; 0 for no limit.
        causal: Whether a token attends only to itself and the tokens before it. If not, the model is an encoder: a text
            is computed in one step, and no layer keeps anything of it.
        output_gate: Whether what a head attends to is multiplied by the sigmoid of a projection of the token.
        sinks: Whether each query head has a learned score that takes part in its softmax and adds no value.
        query_growth: Factor on queries that grows with their position; None for none.
        alibi_slopes: For each query head, the amount that a score loses for each token of distance; empty for none.
        relative_bias: Amounts by distance that an encoder has learned; None for none.
        distances: Vectors of distances that an encoder has learned; None for none.
    """

    scale: float | None = None
    scaled_by_layer: bool = False
    softcap: float = 0.0
    causal: bool = True
    output_gate: bool = False
    sinks: bool = False
    query_growth: QueryGrowth | None = None
    alibi_slopes: tuple[float, ...] = ()
    relative_bias: RelativeBiasSpec | None = None
    distances: DistanceSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Keys and values that are made of one latent for each token, in all layers (elsewhere: MLA).

    Attributes:
        rank: Numbers of a latent of which keys and values are made.
        rope_dim: Numbers of a latent that are the rotated part of the key of every head.
        nope_dim: Numbers of a query or a key that have no position.
        value_dim: Numbers of a value; at most those of a key.
        query_rank: Numbers of the latent of which queries are made; None for queries made of the hidden states.
        down_bias: Whether the projections to the latents have biases.
        norm_eps: Number that the norms of latents add to the mean square.
    """

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None = None
    down_bias: bool = False
    norm_eps: float

    def num_weights(self, hidden_size: int, num_heads: int) -> int:
        """Returns the number of weights of an attention layer."""
        query = num_heads * (self.nope_dim + self.rope_dim)
        of_query = query * hidden_size if self.query_rank is None else self.query_rank * (hidden_size + query)
        up = self.rank * num_heads * (self.nope_dim + self.value_dim)
        return of_query + hidden_size * (self.rank + self.rope_dim + num_heads * self.value_dim) + up


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """Feed-forward networks of which each token goes through a few, in some layers of a model.

    Attributes:
        layers: Numbers of the layers that have experts; the others have one network for all tokens.
        router: The number of experts, and the way in which they are chosen.
        intermediate_size: Width inside each expert.
        gate: Key of `kernels.experts.GATES`.
        bias: Whether the projections of the experts have biases.
        shared_size: Width inside the network that every token of these layers goes through as well; 0 for none.
        shared_gate: Whether the result of that network is multiplied by the sigmoid of a learned projection.
    """

    layers: frozenset[int]
    router: RouterSpec
    intermediate_size: int
    gate: str
    bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """Layers that keep states of fixed size of a sequence, in place of the keys and values of its tokens.

    Such a layer projects each token to a gate, to channels that a short convolution mixes with the last tokens, and to
    numbers of each head that control the recurrence. The channels are inputs of heads, and two vectors of each group of
    heads. The convolution keeps the last inputs of all channels, the recurrence a matrix for each head.

    Attributes:
        layers: Numbers of the layers that keep states; the others have attention.
        rule: The recurrence: `"mamba2"` (`kernels.state_scan`) or `"gated_delta"` (`kernels.gated_delta`).
        num_heads: Number of heads of the recurrence.
        head_dim: Size of the input and the output of a head.
        num_groups: Number of groups of heads that share two vectors.
        state_size: Size of these vectors; the matrix of a head is `[head_dim, state_size]`.
        conv_width: Number of tokens that the convolution sees, the token itself included.
        conv_bias: Whether the convolution has a bias.
        bias: Whether the projections have biases.
    """

    layers: frozenset[int]
    rule: Literal["mamba2", "gated_delta"]
    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_width: int
    conv_bias: bool
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """The description of a language model that is one stack of layers: a decoder, or an encoder (`is_encoder`).

    Attributes:
        vocab_size: Number of rows of the token embedding and of the output head.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the feed-forward network of layers without experts.
        num_layers: Number of decoder layers.
        num_heads: Number of query heads of a layer.
        num_kv_heads: Number of key and value heads of a layer.
        head_dim: Size of a head.
        max_position_embeddings: Number of positions for which the model is defined.
        windows: For each layer, the number of latest tokens that a token attends to, its own included; 0 for all.
        attention: How the attention layers score keys.
        latent: The latents of which keys and values are made; None for a model that projects them from hidden states.
        embedding_size: Width of the token embedding. If it is not `hidden_size`, projections convert between the two.
        embedding_scale: Factor on the rows of the token embedding, rounded to the model's dtype.
        input_scale: Factor on embeddings, also on those that a prompt gives in place of tokens.
        embedding_norm: Whether a norm follows the embedding.
        projection: Where embeddings become as wide as the residual stream: `"first"` projects the rows of the token
            embedding, `"last"` what positions and the norm have made of them, by a projection with a bias.
        num_token_types: Number of types of tokens, each with a learned vector that is added to the embedding; 0 for
            none. The texts of a pair have the types 0 and 1.
        num_tasks: Number of tasks with a learned vector, of which that of the first one is added to the embedding; 0
            for none.
        tie_word_embeddings: Whether the output head uses the matrix of the token embedding.
        rms_norm: Whether norms are root-mean-square norms; otherwise they are layer norms.
        norm_eps: Number that norms add to the mean square or the variance.
        norm_affine: Whether layer norms scale and shift.
        norm_bias: Whether layer norms that scale also shift.
        norm_unit_offset: Whether norms, also those of heads, scale by `1 + weight`.
        norm_placement: `"before"` norms the input of each sublayer, `"after"` the sum of its input and its output,
            `"output"` its output, `"both"` its input and its output.
        parallel: Whether both sublayers read the residual stream before the layer; else the second one has the result
            of the first one in its input.
        shared_norm: Whether parallel sublayers have one norm for both.
        first_norm: Whether the first layer norms the input of its attention, as all others do.
        final_norm: Whether a norm follows the last layer.
        qkv_bias: Whether query, key and value projections have biases.
        attention_out_bias: Whether the attention's output projection has a bias.
        mlp_bias: Whether the feed-forward projections have biases.
        mlp_down_bias: Whether the last of them has one; None if `mlp_bias` holds for it too.
        head_bias: Whether the output head has a bias.
        qk_norm: Whether queries and keys are normed before the rotation.
        qk_norm_form: `"head"` norms each head; `"projection"` norms all query heads of a token together, and all key
            heads; `"layer"` computes a layer norm of each head, with one weight and bias for all; `"per head"` one with
            a weight of its own.
        qkv_limit: Largest absolute value of queries, keys and values, to which others are clamped; 0 for no limit.
        gated_mlp: Whether feed-forward networks are gated; otherwise they have two projections and an activation.
        activation: Key of `layers.GATES` if gated, else of `layers.ACTIVATIONS`.
        experts: The experts; None for a model without them.
        rope: Parameters of rotary positions in all layers; None for a model without them.
        layer_ropes: Parameters of rotary positions in each layer, None for a layer without them; empty if all layers
            have those of `rope`.
        residual_scale: Factor on the result of each sublayer before it is added to the residual stream.
        logit_scale: Factor on the logits of tokens.
        state: The layers that keep states; None for a model in which all layers have attention.
        mlp_layers: Numbers of the layers that are a feed-forward network alone, in a model each of whose layers is a
            single sublayer; None for a model whose layers have two sublayers.
        logit_softcap: Smooth limit on the logits of tokens; 0 for no limit.
        num_labels: Number of classes of a classifier; 0 for other models.
        class_head: The head of a classifier.
        num_layer_weights: Number of layers that have weights of their own; the layers are divided among them in equal
            runs. None if every layer has its own.
        first_conv: The convolution beside the first layer; None for none. A norm follows the sum of both.
        position_offset: Number of leading rows of the table of learned positions that belong to no position; None for
            a model without learned positions.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    windows: tuple[int, ...]
    attention: AttentionSpec = AttentionSpec()
    latent: LatentSpec | None = None
    embedding_size: int
    embedding_scale: float = 1.0
    input_scale: float = 1.0
    embedding_norm: bool = False
    projection: Literal["first", "last"] = "first"
    num_token_types: int = 0
    num_tasks: int = 0
    tie_word_embeddings: bool
    rms_norm: bool
    norm_eps: float
    norm_affine: bool = True
    norm_bias: bool = True
    norm_unit_offset: bool = False
    norm_placement: Literal["before", "after", "output", "both"] = "before"
    parallel: bool = False
    shared_norm: bool = False
    first_norm: bool = True
    final_norm: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    mlp_down_bias: bool | None = None
    head_bias: bool = False
    qk_norm: bool = False
    qk_norm_form: Literal["head", "projection", "layer", "per head"] = "head"
    qkv_limit: float = 0.0
    gated_mlp: bool
    activation: str
    experts: ExpertsSpec | None = None
    state: StateSpec | None = None
    mlp_layers: frozenset[int] | None = None
    rope: RopeSpec | None = None
    layer_ropes: tuple[RopeSpec | None, ...] = ()
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    num_labels: int = 0
    class_head: HeadSpec = HeadSpec()
    num_layer_weights: int | None = None
    first_conv: ConvSpec | None = None
    position_offset: int | None = None

    def __post_init__(self) -> None:
        assert len(self.windows) == self.num_layers
        assert self.num_heads % self.num_kv_heads == 0
        assert len(self.attention.alibi_slopes) in (0, self.num_heads)
        assert not self.layer_ropes or (self.rope is None and len(self.layer_ropes) == self.num_layers)
        ropes = self.layer_ropes or (self.rope,)
        fused = self.qk_norm and self.qk_norm_form == "head"
        if fused and None in ropes:
            raise UnsupportedModelError(
                "config field 'rope_parameters' is null for a layer; heads with norms need rotary positions"
            )
        edits = (self.qk_norm, self.qkv_limit, self.attention.query_growth)
        assert sum(map(bool, edits)) <= 1, "no model does two of these"
        assert self.residual_scale == 1 or self.norm_placement == "before", "only these blocks scale their sublayers"
        assert not self.parallel or (self.norm_placement == "before" and self.residual_scale == 1)
        assert self.parallel or not self.shared_norm
        is_plain = self.norm_placement == "before" and self.residual_scale == 1 and not self.parallel
        assert self.mlp_layers is None or is_plain, "a single sublayer has a norm before it and nothing else"
        assert not (self.head_bias and self.tie_word_embeddings), "the layer of a tied head has no bias"
        assert self.logit_scale == 1 or not self.logit_softcap, "no model has both"
        by_distance = (self.attention.relative_bias, self.attention.distances, self.attention.alibi_slopes)
        assert sum(map(bool, by_distance)) <= 1, "no model does two of these"
        assert self.is_encoder or not any(by_distance[:2]), "only encoders have these"
        if self.is_encoder and (self.latent or self.state or self.attention.sinks or self.attention.output_gate):
            raise UnsupportedModelError(
                "attention to later tokens is not there for models with latents, states, sinks or output gates"
            )
        assert self.first_conv is None or (self.is_encoder and self.norm_placement == "after")
        assert self.num_layers % (self.num_layer_weights or 1) == 0
        assert self.num_layer_weights is None or (self.is_encoder and self.norm_placement == "after")

    @property
    def is_encoder(self) -> bool:
        """Whether tokens attend to later tokens too, so that a text is computed whole and nothing of it is kept."""
        return not self.attention.causal

    @property
    def output_size(self) -> int:
        """Width of the vectors that the model returns."""
        return self.embedding_size if self.projection == "first" else self.hidden_size

    @property
    def class_pooling(self) -> str:
        """The vector of a text that a classifier reads, as `HeadSpec.pooling`."""
        return self.class_head.pooling

    def weights_of(self, layer_idx: int) -> int:
        """Returns the number of the weights that a layer uses; mostly the layer's own number."""
        return layer_idx // (self.num_layers // (self.num_layer_weights or self.num_layers))

    def rope_of(self, layer_idx: int) -> RopeSpec | None:
        """Returns the parameters of rotary positions in a layer; None for a layer without them."""
        return self.layer_ropes[layer_idx] if self.layer_ropes else self.rope

    def attention_scale(self, layer_idx: int) -> float:
        """Returns the factor on the product of a query and a key in a layer."""
        scale = self.head_dim**-0.5 if self.attention.scale is None else self.attention.scale
        return scale / (layer_idx + 1) if self.attention.scaled_by_layer else scale

    @property
    def attention_layers(self) -> list[int]:
        """Numbers of the layers that keep keys and values."""
        others = frozenset[int]() if self.state is None else self.state.layers
        return [layer for layer in range(self.num_layers) if layer not in others and self.has_mixer(layer)]

    @property
    def dense_layers(self) -> list[int]:
        """Numbers of the layers that have one feed-forward network for all tokens."""
        others = frozenset[int]() if self.experts is None else self.experts.layers
        return [layer for layer in range(self.num_layers) if layer not in others and self.has_mlp(layer)]

    def has_mixer(self, layer_idx: int) -> bool:
        """Returns whether tokens see others in a layer: by attention, or by a recurrence."""
        return self.mlp_layers is None or layer_idx not in self.mlp_layers

    def has_mlp(self, layer_idx: int) -> bool:
        """Returns whether a layer has a feed-forward network, or experts."""
        return self.mlp_layers is None or layer_idx in self.mlp_layers
