"""The family of Bloom (BigScience, 2022, arXiv:2211.05100): `bloom_spec`."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..alibi import alibi_slopes
from ..family import Family
from ..hf_config import flag, positive_float, positive_int, whole_heads
from ..spec import AttentionSpec, DecoderSpec

__all__ = ["FAMILIES", "bloom_spec", "bloom_weights"]

TRAINED_LENGTH = 2048
"""Tokens of the sequences with which Bloom was trained, for the configs without the field `seq_length`."""


def bloom_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `BloomConfig`: scores that fall with distance, and a norm after the embedding."""
    for field in ("apply_residual_connection_post_layernorm", "slow_but_exact"):
        if flag(config, field, False):
            raise UnsupportedModelError(f"config field {field!r} is true; it is implemented for false only")
    heads = whole_heads(config)
    num_layers = positive_int(config, "n_layer")
    num_positions = positive_int(config, "seq_length") if hasattr(config, "seq_length") else TRAINED_LENGTH
    return DecoderSpec(
        vocab_size=positive_int(config, "vocab_size"),
        **heads,
        intermediate_size=4 * heads["hidden_size"],
        num_layers=num_layers,
        num_kv_heads=heads["num_heads"],
        max_position_embeddings=num_positions,
        windows=(0,) * num_layers,
        attention=AttentionSpec(alibi_slopes=alibi_slopes(heads["num_heads"])),
        embedding_size=heads["hidden_size"],
        embedding_norm=True,
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
        rms_norm=False,
        norm_eps=positive_float(config, "layer_norm_epsilon", most=1.0),
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        activation="gelu_pytorch_tanh",
    )


def bloom_weights(spec: DecoderSpec) -> WeightMap:
    """Returns the names of Bloom's weights, which Falcon's checkpoints have too."""
    return WeightMap(
        prefixes=("transformer.",),
        modules={
            "word_embeddings": "embed_tokens",
            "word_embeddings_layernorm": "embedding_norm",
            "h.*.input_layernorm": "layers.*.attention_norm",
            "h.*.self_attention": "layers.*.attention.kv_scales",
            "h.*.self_attention.query_key_value": "layers.*.attention.qkv",
            "h.*.self_attention.dense": "layers.*.attention.out",
            "h.*.post_attention_layernorm": "layers.*.mlp_norm",
            "h.*.mlp.dense_h_to_4h": "layers.*.mlp.up",
            "h.*.mlp.dense_4h_to_h": "layers.*.mlp.down",
            "ln_f": "norm",
            "lm_head": "lm_head",
            "score": "score",
        },
        layouts={"h.*.self_attention.query_key_value": TensorLayout(("query", "key", "value"), spec.num_kv_heads)},
    )


FAMILIES = (Family(("BloomForCausalLM",), bloom_spec, bloom_weights),)
