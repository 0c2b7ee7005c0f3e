"""The family of SmolLM 3 (Hugging Face, 2025): `smollm3_spec`. SmolLM 1 and 2 are Llama models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ..family import Family
from ..hf_config import attention_windows
from ..spec import DecoderSpec
from .llama import WEIGHTS, llama_spec

__all__ = ["FAMILIES", "smollm3_spec"]


def smollm3_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `SmolLM3Config`: Llama; some layers have no positions, and some may have windows."""
    spec = llama_spec(config)
    has_rope = config.no_rope_layers  # The name says the opposite of what the numbers mean.
    if not isinstance(has_rope, list) or len(has_rope) < spec.num_layers or not all(n in (0, 1) for n in has_rope):
        raise UnsupportedModelError(
            f"config field 'no_rope_layers' is {quote(has_rope)}; it must say 1 or 0 for each of the "
            f"{spec.num_layers} layers: whether it has rotary positions"
        )
    ropes = tuple(spec.rope if n else None for n in has_rope[: spec.num_layers])
    return replace(spec, windows=attention_windows(config), rope=None, layer_ropes=ropes)


FAMILIES = (Family(("SmolLM3ForCausalLM",), smollm3_spec, WEIGHTS),)
