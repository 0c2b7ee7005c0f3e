"""The family of DistilBERT (Sanh et al., 2019, arXiv:1910.01108)."""

from __future__ import annotations

from typing import Any

from ..family import CLASSIFIER, TOKEN_CLASSIFIER, Family
from ..spec import DecoderSpec, HeadSpec
from .bert import EMBEDDINGS, encoder_fields, encoder_weights

__all__ = ["FAMILIES", "distilbert_spec"]

MODULES = {
    **EMBEDDINGS,
    "transformer.layer.*.attention.q_lin": "layers.*.attention.qkv.query",
    "transformer.layer.*.attention.k_lin": "layers.*.attention.qkv.key",
    "transformer.layer.*.attention.v_lin": "layers.*.attention.qkv.value",
    "transformer.layer.*.attention.out_lin": "layers.*.attention.out",
    "transformer.layer.*.sa_layer_norm": "layers.*.attention_norm",
    "transformer.layer.*.ffn.lin1": "layers.*.mlp.up",
    "transformer.layer.*.ffn.lin2": "layers.*.mlp.down",
    "transformer.layer.*.output_layer_norm": "layers.*.mlp_norm",
}
"""Names of the modules in checkpoints -> ours."""


def distilbert_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `DistilBertConfig`: as BERT, without types of tokens."""
    fields = encoder_fields(config, intermediate_size="hidden_dim", activation="activation", norm_eps=1e-12)
    return DecoderSpec(**fields, position_offset=0)


FAMILIES = (
    Family(
        ("DistilBertModel",),
        distilbert_spec,
        encoder_weights(
            "distilbert.",
            modules=MODULES,
            head={"pre_classifier": "score.dense", "classifier": "score.out"},
            training_heads=("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
        ),
        heads={CLASSIFIER: HeadSpec("CLS", "relu", bias=True), TOKEN_CLASSIFIER: HeadSpec(bias=True)},
    ),
)
