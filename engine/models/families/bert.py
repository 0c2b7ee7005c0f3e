"""The families of BERT (Devlin et al., 2018, arXiv:1810.04805) and RoBERTa: `bert_spec`, `roberta_spec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import ACTIVATIONS
from ...weights.checkpoint import WeightMap
from ..family import CLASSIFIER, TOKEN_CLASSIFIER, Family
from ..hf_config import flag, one_of, positive_float, positive_int, whole_heads
from ..spec import AttentionSpec, DecoderSpec, HeadSpec

__all__ = ["BLOCK", "EMBEDDINGS", "FAMILIES", "bert_spec", "encoder_fields", "roberta_spec"]

BLOCK = {
    "encoder.layer.*.attention.self.query": "layers.*.attention.qkv.query",
    "encoder.layer.*.attention.self.key": "layers.*.attention.qkv.key",
    "encoder.layer.*.attention.self.value": "layers.*.attention.qkv.value",
    "encoder.layer.*.attention.output.dense": "layers.*.attention.out",
    "encoder.layer.*.attention.output.LayerNorm": "layers.*.attention_norm",
    "encoder.layer.*.intermediate.dense": "layers.*.mlp.up",
    "encoder.layer.*.output.dense": "layers.*.mlp.down",
    "encoder.layer.*.output.LayerNorm": "layers.*.mlp_norm",
}
"""Names of the layers of BERT and its kin -> ours."""

EMBEDDINGS = {
    "embeddings.word_embeddings": "embed_tokens",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "embedding_norm",
}
"""Names of the embeddings of BERT and its kin -> ours."""


def _weights(prefix: str, head: Mapping[str, str]) -> Callable[[DecoderSpec], WeightMap]:
    """Returns the function that makes the map of the weights, from the names of the two layers of the head."""

    def weights(spec: DecoderSpec) -> WeightMap:
        used = head if spec.class_head.activation else {"classifier": "score"}
        return WeightMap(
            prefixes=(prefix,),
            modules={**EMBEDDINGS, **BLOCK, **used},
            ignored=tuple({"pooler.dense", "embeddings.position_ids", "embeddings.token_type_ids"} - used.keys()),
            ignored_starts=("cls.", "lm_head."),
        )

    return weights


def encoder_fields(config: Any) -> dict[str, Any]:
    """Returns the `DecoderSpec` fields that are read alike for BERT and its kin: norms after sublayers, biases."""
    heads, num_layers = whole_heads(config), positive_int(config, "num_hidden_layers")
    return {
        **heads,
        "vocab_size": positive_int(config, "vocab_size"),
        "intermediate_size": positive_int(config, "intermediate_size"),
        "num_layers": num_layers,
        "num_kv_heads": heads["num_heads"],
        "max_position_embeddings": positive_int(config, "max_position_embeddings"),
        "windows": (0,) * num_layers,
        "attention": AttentionSpec(causal=False),
        "embedding_size": heads["hidden_size"],
        "embedding_norm": True,
        "tie_word_embeddings": False,
        "rms_norm": False,
        "norm_eps": positive_float(config, "layer_norm_eps", most=1.0),
        "norm_placement": "after",
        "final_norm": False,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
        "activation": one_of(config, "hidden_act", tuple(ACTIVATIONS)),
    }


def bert_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `BertConfig`: positions from 0, and two types of tokens."""
    kind = getattr(config, "position_embedding_type", None)
    if kind not in (None, "absolute"):
        raise UnsupportedModelError(f"config field 'position_embedding_type' is {quote(kind)}; only 'absolute' is done")
    if flag(config, "is_decoder", False):
        raise UnsupportedModelError("config field 'is_decoder' is true: of BERT and its kin only the encoder is there")
    return DecoderSpec(
        **encoder_fields(config), position_offset=0, num_token_types=positive_int(config, "type_vocab_size")
    )


def roberta_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `RobertaConfig`: as BERT, with positions that begin after the id of the padding token."""
    offset = _pad_token_id(config) + 1
    spec = bert_spec(config)
    if spec.max_position_embeddings <= offset:
        raise UnsupportedModelError(
            f"config field 'max_position_embeddings' is {spec.max_position_embeddings}; with pad_token_id={offset - 1} "
            f"it must be more than {offset}"
        )
    return replace(spec, max_position_embeddings=spec.max_position_embeddings - offset, position_offset=offset)


def _pad_token_id(config: Any) -> int:
    value = getattr(config, "pad_token_id", None)
    if type(value) is not int or value < 0:
        raise UnsupportedModelError(
            f"config field 'pad_token_id' is {quote(value)}; it must be an integer of at least 0"
        )
    return value


HEADS = {CLASSIFIER: HeadSpec("CLS", "tanh", bias=True), TOKEN_CLASSIFIER: HeadSpec(bias=True)}

FAMILIES = (
    Family(
        ("BertModel",),
        bert_spec,
        _weights("bert.", {"pooler.dense": "score.dense", "classifier": "score.out"}),
        heads=HEADS,
    ),
    Family(
        ("RobertaModel", "XLMRobertaModel", "CamembertModel"),
        roberta_spec,
        _weights("roberta.", {"classifier.dense": "score.dense", "classifier.out_proj": "score.out"}),
        heads=HEADS,
    ),
)
