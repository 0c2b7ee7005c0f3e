"""The family of Ministral 3 (Mistral AI, 2025), the part that reads text: `ministral3_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ..family import Family
from ..hf_config import is_positive_number
from ..spec import AttentionSpec, DecoderSpec, QueryGrowth
from .llama import WEIGHTS, mistral_spec

__all__ = ["FAMILIES", "ministral3_spec"]


def ministral3_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Ministral3Config`: Mistral with a factor on queries that grows with their position."""
    spec, rope = mistral_spec(config), config.rope_parameters
    beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    if not is_positive_number(beta) or not is_positive_number(length):
        raise UnsupportedModelError(
            f"config field 'rope_parameters' is {quote(rope)}; 'llama_4_scaling_beta' and "
            "'original_max_position_embeddings' must be positive numbers"
        )
    return replace(spec, attention=AttentionSpec(query_growth=QueryGrowth(float(beta), length)))


FAMILIES = (Family(("Ministral3ForCausalLM",), ministral3_spec, WEIGHTS),)
