"""The families of ELECTRA (Clark et al., 2020, arXiv:2003.10555) and RemBERT (Chung et al., 2020, arXiv:2010.12821)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..family import CLASSIFIER, TOKEN_CLASSIFIER, Family
from ..hf_config import positive_int
from ..spec import DecoderSpec, HeadSpec
from .bert import BLOCK, EMBEDDINGS, HEADS, POOLED, bert_spec, encoder_weights

__all__ = ["FAMILIES", "electra_spec", "rembert_spec"]


def electra_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `ElectraConfig`: as BERT, with embeddings that may be narrower than the layers."""
    spec, size = bert_spec(config), positive_int(config, "embedding_size")
    return spec if size == spec.hidden_size else replace(spec, embedding_size=size, projection="last")


def rembert_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `RemBertConfig`: as BERT, with embeddings that are projected to the width of the layers."""
    size = positive_int(config, "input_embedding_size")
    return replace(bert_spec(config), embedding_size=size, projection="last")


FAMILIES = (
    Family(
        ("ElectraModel",),
        electra_spec,
        encoder_weights(
            "electra.",
            modules={**EMBEDDINGS, **BLOCK, "embeddings_project": "project_normed"},
            training_heads=("discriminator_predictions.", "generator_predictions.", "generator_lm_head."),
        ),
        heads={CLASSIFIER: HeadSpec("CLS", "gelu", bias=True), TOKEN_CLASSIFIER: HeadSpec(bias=True)},
    ),
    Family(
        ("RemBertModel",),
        rembert_spec,
        encoder_weights(
            "rembert.",
            modules={**EMBEDDINGS, **BLOCK, "encoder.embedding_hidden_mapping_in": "project_normed"},
            head=POOLED,
        ),
        heads=HEADS,
    ),
)
