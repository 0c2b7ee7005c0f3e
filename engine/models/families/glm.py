"""The families of GLM 4 without experts (Team GLM, 2024, arXiv:2406.12793): `glm_spec`, `glm4_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..family import Family
from ..hf_config import flag
from ..spec import DecoderSpec
from .llama import gated_fields
from .phi3 import WEIGHTS as PHI3_WEIGHTS

__all__ = ["FAMILIES", "GLM4_WEIGHTS", "WEIGHTS", "glm4_spec", "glm_spec"]

_ATTENTION = {
    f"layers.*.self_attn.{name[0]}_proj": f"layers.*.attention.qkv.{name}" for name in ("query", "key", "value")
}

WEIGHTS = replace(
    PHI3_WEIGHTS,
    modules={**PHI3_WEIGHTS.modules, **_ATTENTION},
    layouts={name: layout for name, layout in PHI3_WEIGHTS.layouts.items() if "mlp" in name},
)
GLM4_WEIGHTS = replace(
    WEIGHTS,
    modules={
        **WEIGHTS.modules,
        "layers.*.post_self_attn_layernorm": "layers.*.attention_out_norm",
        "layers.*.post_mlp_layernorm": "layers.*.mlp_out_norm",
    },
)


def glm_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GlmConfig`: neighbours in a part of each head are rotated, and some projections biased."""
    return DecoderSpec(
        **gated_fields(config, partial=True, interleaved=True),
        windows=(0,) * config.num_hidden_layers,
        qkv_bias=flag(config, "attention_bias", True),
    )


def glm4_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Glm4Config`: GLM with norms on both sides of each sublayer."""
    return replace(glm_spec(config), norm_placement="both")


FAMILIES = (
    Family(("GlmForCausalLM",), glm_spec, WEIGHTS),
    Family(("Glm4ForCausalLM",), glm4_spec, GLM4_WEIGHTS),
)
