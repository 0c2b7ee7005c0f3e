"""The family of ModernBERT (Warner et al., 2024, arXiv:2412.13663): `modernbert_spec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...layers import GATES, HEAD_ACTIVATIONS
from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..family import CLASSIFIER, TOKEN_CLASSIFIER, Family
from ..hf_config import attention_windows, flag, one_of, positive_float, positive_int, whole_heads
from ..rope import rope_fields
from ..spec import AttentionSpec, ClassPooling, DecoderSpec, HeadSpec

__all__ = ["FAMILIES", "modernbert_spec"]

BODY = {
    "embeddings.tok_embeddings": "embed_tokens",
    "embeddings.norm": "embedding_norm",
    "layers.*.attn_norm": "layers.*.attention_norm",
    "layers.*.attn.Wqkv": "layers.*.attention.qkv",
    "layers.*.attn.Wo": "layers.*.attention.out",
    "layers.*.mlp_norm": "layers.*.mlp_norm",
    "layers.*.mlp.Wi": "layers.*.mlp.gate_up",
    "layers.*.mlp.Wo": "layers.*.mlp.down",
    "final_norm": "norm",
}

HEAD = {"head.dense": "score.dense", "head.norm": "score.norm", "classifier": "score.out"}

LAYOUTS = {
    "layers.*.attn.Wqkv": TensorLayout(("query", "key", "value")),
    "layers.*.mlp.Wi": TensorLayout(("gate", "up")),
}

POOLINGS: Mapping[str, ClassPooling] = {"cls": "CLS", "mean": "MEAN"}
"""Values of `classifier_pooling` -> values of `HeadSpec.pooling`."""


def modernbert_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `ModernBertConfig`: gated networks, rotary positions and windows by layer type."""
    heads, bias = whole_heads(config), flag(config, "attention_bias", False)
    return DecoderSpec(
        **heads,
        **rope_fields(config),
        vocab_size=positive_int(config, "vocab_size"),
        intermediate_size=positive_int(config, "intermediate_size"),
        num_layers=positive_int(config, "num_hidden_layers"),
        num_kv_heads=heads["num_heads"],
        max_position_embeddings=positive_int(config, "max_position_embeddings"),
        windows=_windows(config),
        attention=AttentionSpec(causal=False),
        embedding_size=heads["hidden_size"],
        embedding_norm=True,
        tie_word_embeddings=False,
        rms_norm=False,
        norm_eps=positive_float(config, "norm_eps", most=1.0),
        norm_bias=flag(config, "norm_bias", False),
        first_norm=False,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=flag(config, "mlp_bias", False),
        gated_mlp=True,
        activation=one_of(config, "hidden_activation", tuple(GATES)),
    )


def _windows(config: Any) -> tuple[int, ...]:
    """Returns the windows of all layers; `sliding_window` of these configs does not count the token itself."""
    positive_int(config, "local_attention")
    return tuple(window + 1 if window else 0 for window in attention_windows(config))


def _head(config: Any) -> HeadSpec:
    pooling = POOLINGS[one_of(config, "classifier_pooling", tuple(POOLINGS))]
    activation = one_of(config, "classifier_activation", tuple(HEAD_ACTIVATIONS))
    return HeadSpec(pooling, activation, flag(config, "classifier_bias", False), norm=True, bias=True)


def _weights(spec: DecoderSpec) -> WeightMap:
    """Returns the map of the weights. Models without a classifier may have the head of their training."""
    head = HEAD if spec.num_labels else {}
    ignored = () if head else (*HEAD, "decoder")
    return WeightMap(prefixes=("model.",), modules={**BODY, **head}, layouts=LAYOUTS, ignored=ignored)


FAMILIES = (
    Family(("ModernBertModel",), modernbert_spec, _weights, heads={CLASSIFIER: _head, TOKEN_CLASSIFIER: _head}),
)
