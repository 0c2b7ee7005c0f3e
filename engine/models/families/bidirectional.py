"""Families of Llama with attention to later tokens: EuroBERT (arXiv:2503.05500) and NVIDIA's bidirectional Llama.

Other decoders say in a field of their config that they attend so; `describe_model` reads it for all families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...weights.checkpoint import WeightMap
from ..family import CLASSIFIER, TOKEN_CLASSIFIER, Family
from ..hf_config import one_of, positive_float
from ..spec import AttentionSpec, ClassPooling, DecoderSpec, HeadSpec
from .llama import WEIGHTS, llama_spec

__all__ = ["FAMILIES", "bidirectional_spec"]

BODY = {name: ours for name, ours in WEIGHTS.modules.items() if name not in ("lm_head", "score")}

EUROBERT_POOLINGS: Mapping[str, ClassPooling] = {"bos": "CLS", "mean": "MEAN"}
"""Values of `classifier_pooling` -> values of `HeadSpec.pooling`; `late`, the mean of the logits, is not there."""

LLAMA_POOLINGS: Mapping[str, ClassPooling] = {"avg": "MEAN", "cls": "CLS", "last": "LAST"}
"""Values of `pooling` -> values of `HeadSpec.pooling`."""


def bidirectional_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `EuroBertConfig` or of NVIDIA's `LlamaBidirectionalConfig`: Llama with other attention."""
    return replace(llama_spec(config), attention=AttentionSpec(causal=False))


def _eurobert_weights(spec: DecoderSpec) -> WeightMap:
    """Returns the map of the weights. Models without a classifier may have the head of their training."""
    head = (
        {"dense": "score.dense", "classifier": "score.out"} if spec.class_head.activation else {"classifier": "score"}
    )
    return replace(
        WEIGHTS, modules={**BODY, **(head if spec.num_labels else {})}, ignored=(*WEIGHTS.ignored, "lm_head")
    )


def _eurobert_head(config: Any) -> HeadSpec:
    pooling = EUROBERT_POOLINGS[one_of(config, "classifier_pooling", tuple(EUROBERT_POOLINGS))]
    return HeadSpec(pooling, "gelu", bias=True)


def _llama_head(config: Any) -> HeadSpec:
    pooling = LLAMA_POOLINGS[one_of(config, "pooling", tuple(LLAMA_POOLINGS))]
    is_scaled = getattr(config, "temperature", None) is not None
    return HeadSpec(pooling, scale=1 / positive_float(config, "temperature") if is_scaled else 1.0)


FAMILIES = (
    Family(
        ("EuroBertModel",),
        bidirectional_spec,
        _eurobert_weights,
        heads={CLASSIFIER: _eurobert_head, TOKEN_CLASSIFIER: HeadSpec(bias=True)},
    ),
    Family(
        ("LlamaBidirectionalModel",),
        bidirectional_spec,
        WEIGHTS,
        heads={CLASSIFIER: _llama_head, TOKEN_CLASSIFIER: HeadSpec(bias=True)},
    ),
)
