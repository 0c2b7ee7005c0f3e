"""The family of Granite 3 and 4 without experts and states (IBM, 2024): `granite_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..family import Family
from ..hf_config import positive_float
from ..spec import AttentionSpec, DecoderSpec
from .llama import WEIGHTS, llama_spec

__all__ = ["FAMILIES", "granite_spec"]


def granite_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GraniteConfig`: Llama with factors on embeddings, scores, sublayers and token logits."""
    return replace(
        llama_spec(config),
        attention=AttentionSpec(scale=positive_float(config, "attention_multiplier")),
        input_scale=positive_float(config, "embedding_multiplier"),
        residual_scale=positive_float(config, "residual_multiplier"),
        logit_scale=1 / positive_float(config, "logits_scaling"),
    )


FAMILIES = (Family(("GraniteForCausalLM",), granite_spec, WEIGHTS),)
