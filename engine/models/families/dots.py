"""The family of dots.llm1 (rednote-hilab, 2025, arXiv:2506.05767): `dots1_spec`, Qwen 3 with DeepSeek-V3's experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..family import Family
from ..spec import DecoderSpec
from .glm_moe import WEIGHTS, corrected_experts
from .qwen import qwen3_spec

__all__ = ["FAMILIES", "dots1_spec"]


def dots1_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Dots1Config`: Qwen 3 with experts in all layers but the first ones."""
    return replace(qwen3_spec(config), experts=corrected_experts(config))


FAMILIES = (Family(("Dots1ForCausalLM",), dots1_spec, WEIGHTS),)
