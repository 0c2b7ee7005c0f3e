"""The family of ALBERT (Lan et al., 2019, arXiv:1909.11942), in which several layers have the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError
from ..family import Family
from ..hf_config import positive_int
from ..spec import DecoderSpec
from .bert import EMBEDDINGS, HEADS, bert_spec, encoder_weights

__all__ = ["FAMILIES", "albert_spec"]

_LAYER = "encoder.albert_layer_groups.*.albert_layers.0"

MODULES = {
    **EMBEDDINGS,
    "encoder.embedding_hidden_mapping_in": "project_normed",
    f"{_LAYER}.attention.query": "layers.*.attention.qkv.query",
    f"{_LAYER}.attention.key": "layers.*.attention.qkv.key",
    f"{_LAYER}.attention.value": "layers.*.attention.qkv.value",
    f"{_LAYER}.attention.dense": "layers.*.attention.out",
    f"{_LAYER}.attention.LayerNorm": "layers.*.attention_norm",
    f"{_LAYER}.ffn": "layers.*.mlp.up",
    f"{_LAYER}.ffn_output": "layers.*.mlp.down",
    f"{_LAYER}.full_layer_layer_norm": "layers.*.mlp_norm",
}
"""Names of the modules in checkpoints -> ours. A group has the weights of consecutive layers."""


def albert_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `AlbertConfig`: as BERT, with groups of layers that share weights."""
    num_groups, inner = positive_int(config, "num_hidden_groups"), positive_int(config, "inner_group_num")
    spec, size = bert_spec(config), positive_int(config, "embedding_size")
    if spec.num_layers % num_groups:
        raise UnsupportedModelError(
            f"config field 'num_hidden_groups' is {num_groups}; it must divide num_hidden_layers={spec.num_layers}"
        )
    if inner != 1:
        raise UnsupportedModelError(f"config field 'inner_group_num' is {inner}; only 1 is done")
    return replace(spec, embedding_size=size, projection="last", num_layer_weights=num_groups)


FAMILIES = (
    Family(
        ("AlbertModel",),
        albert_spec,
        encoder_weights(
            "albert.",
            modules=MODULES,
            head={"pooler": "score.dense", "classifier": "score.out"},
            training_heads=("predictions.", "sop_classifier."),
            numbered_parts=("albert_layers",),
        ),
        heads=HEADS,
    ),
)
