"""The encoders of T5 (Raffel et al., 2020, arXiv:1910.10683) and mT5, such as those of sentence-t5."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import ACTIVATIONS, GATES
from ..family import TOKEN_CLASSIFIER, Family
from ..hf_config import positive_float, positive_int
from ..spec import AttentionSpec, DecoderSpec, HeadSpec, RelativeBiasSpec
from .bert import encoder_weights

__all__ = ["FAMILIES", "t5_spec"]

TRAINED_LENGTH = 512
"""Tokens of a text for which models without `n_positions` in their config were trained; none has learned positions."""

GATED = "gated-"
"""Beginning of the names of gated activations in configs. GELU is the approximation there."""

MODULES = {
    "encoder.embed_tokens": "embed_tokens",
    "shared": "embed_tokens",
    "encoder.block.*.layer.0.SelfAttention.q": "layers.*.attention.qkv.query",
    "encoder.block.*.layer.0.SelfAttention.k": "layers.*.attention.qkv.key",
    "encoder.block.*.layer.0.SelfAttention.v": "layers.*.attention.qkv.value",
    "encoder.block.*.layer.0.SelfAttention.o": "layers.*.attention.out",
    "encoder.block.*.layer.0.SelfAttention.relative_attention_bias": "relative_bias",
    "encoder.block.*.layer.0.layer_norm": "layers.*.attention_norm",
    "encoder.block.*.layer.1.DenseReluDense.wi": "layers.*.mlp.up",
    "encoder.block.*.layer.1.DenseReluDense.wi_0": "layers.*.mlp.gate_up.gate",
    "encoder.block.*.layer.1.DenseReluDense.wi_1": "layers.*.mlp.gate_up.up",
    "encoder.block.*.layer.1.DenseReluDense.wo": "layers.*.mlp.down",
    "encoder.block.*.layer.1.layer_norm": "layers.*.mlp_norm",
    "encoder.final_layer_norm": "norm",
}
"""Names of the modules in checkpoints -> ours. Only the first block has amounts by distance, which all others use."""


def t5_spec(config: Any) -> DecoderSpec:
    """Returns the spec of the encoder of a `T5Config`: norms before sublayers, scores without a scale."""
    num_layers, num_heads = positive_int(config, "num_layers"), positive_int(config, "num_heads")
    return DecoderSpec(
        vocab_size=positive_int(config, "vocab_size"),
        hidden_size=positive_int(config, "d_model"),
        intermediate_size=positive_int(config, "d_ff"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=positive_int(config, "d_kv"),
        max_position_embeddings=positive_int(config, "n_positions")
        if hasattr(config, "n_positions")
        else TRAINED_LENGTH,
        windows=(0,) * num_layers,
        attention=AttentionSpec(causal=False, scale=1.0, relative_bias=_relative_bias(config)),
        embedding_size=positive_int(config, "d_model"),
        tie_word_embeddings=False,
        rms_norm=True,
        norm_eps=positive_float(config, "layer_norm_epsilon", most=1.0),
        **_activation(config),
    )


def _relative_bias(config: Any) -> RelativeBiasSpec:
    num_buckets = positive_int(config, "relative_attention_num_buckets")
    max_distance = positive_int(config, "relative_attention_max_distance")
    if num_buckets % 2 or num_buckets < 4:
        raise UnsupportedModelError(
            f"config field 'relative_attention_num_buckets' is {num_buckets}; it must be even, and at least 4"
        )
    if max_distance <= num_buckets // 4:
        raise UnsupportedModelError(
            f"config field 'relative_attention_max_distance' is {max_distance}; with {num_buckets} buckets it must be "
            f"more than {num_buckets // 4}"
        )
    return RelativeBiasSpec(num_buckets, max_distance)


def _activation(config: Any) -> dict[str, Any]:
    """Returns the spec fields of the feed-forward network, which one field of the config describes."""
    value: Any = getattr(config, "feed_forward_proj", None)
    gated = {GATED + ("gelu" if name == "gelu_pytorch_tanh" else name): name for name in GATES if name != "gelu"}
    if value in gated:
        return {"gated_mlp": True, "activation": gated[value]}
    if value not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"config field 'feed_forward_proj' is {quote(value)}; implemented for this architecture: "
            f"{', '.join((*gated, *ACTIVATIONS))}"
        )
    return {"gated_mlp": False, "activation": value}


FAMILIES = (
    Family(
        ("T5EncoderModel", "MT5EncoderModel", "T5ForTokenClassification", "MT5ForTokenClassification"),
        t5_spec,
        encoder_weights(
            "transformer.", modules=MODULES, training_heads=("decoder.", "lm_head."), numbered_parts=("layer",)
        ),
        heads={TOKEN_CLASSIFIER: HeadSpec(bias=True)},
    ),
)
