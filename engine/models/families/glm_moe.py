"""The family of GLM-4.5 (GLM-4.5 Team, 2025, arXiv:2508.06471): `glm4_moe_spec`, with the routers of DeepSeek-V3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import RouterSpec
from ...weights.checkpoint import WeightMap
from ..expert_fields import corrected_router, expert_gate, layers_after
from ..family import Family
from ..hf_config import flag, positive_int
from ..spec import DecoderSpec, ExpertsSpec
from .llama import gated_fields
from .qwen_moe import WEIGHTS as QWEN_WEIGHTS

__all__ = ["FAMILIES", "WEIGHTS", "corrected_experts", "glm4_moe_spec", "glm4_moe_weights", "shared_experts"]

WEIGHTS = replace(
    QWEN_WEIGHTS,
    modules={
        **QWEN_WEIGHTS.modules,
        "layers.*.mlp.shared_experts.gate_proj": "layers.*.mlp.shared.gate_up.gate",
        "layers.*.mlp.shared_experts.up_proj": "layers.*.mlp.shared.gate_up.up",
        "layers.*.mlp.shared_experts.down_proj": "layers.*.mlp.shared.down",
    },
    tensors={**QWEN_WEIGHTS.tensors, "layers.*.mlp.gate.e_score_correction_bias": "layers.*.mlp.router.correction"},
)
"""The names of DeepSeek-V3, which several families share."""


def glm4_moe_weights(spec: DecoderSpec) -> WeightMap:
    """Returns the names of a model's weights, without the layer behind the last one, which predicts further tokens."""
    return replace(WEIGHTS, ignored_starts=(f"layers.{spec.num_layers}.",))


def glm4_moe_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Glm4MoeConfig`: a part of each head is rotated, and the first layers have no experts."""
    return DecoderSpec(
        **gated_fields(config, partial=True),
        windows=(0,) * config.num_hidden_layers,
        qkv_bias=flag(config, "attention_bias", False),
        qk_norm=flag(config, "use_qk_norm", False),
        experts=corrected_experts(config),
    )


def corrected_experts(config: Any) -> ExpertsSpec:
    """Returns the experts that a config describes with the fields of DeepSeek-V3."""
    return shared_experts(config, corrected_router(config), layers_after(config))


def shared_experts(config: Any, router: RouterSpec, layers: frozenset[int]) -> ExpertsSpec:
    """Returns the experts that a config describes with the fields of DeepSeek-V2 and V3.

    Args:
        config: A transformers config.
        router: The way to choose experts.
        layers: Numbers of the layers that have experts.
    """
    size = positive_int(config, "moe_intermediate_size")
    return ExpertsSpec(
        layers=layers,
        router=router,
        intermediate_size=size,
        gate=expert_gate(config),
        shared_size=size * positive_int(config, "n_shared_experts"),
    )


FAMILIES = (Family(("Glm4MoeForCausalLM",), glm4_moe_spec, glm4_moe_weights),)
