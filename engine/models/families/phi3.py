"""The family of Phi 3, 3.5 and 4 without experts (Abdin et al., 2024, arXiv:2404.14219): `phi3_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...weights.tensor_layout import TensorLayout
from ..family import Family
from ..hf_config import attention_windows
from ..spec import DecoderSpec
from .llama import WEIGHTS as LLAMA_WEIGHTS
from .llama import gated_fields

__all__ = ["FAMILIES", "WEIGHTS", "phi3_spec"]

_SEPARATE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Projections of Llama that these checkpoints have fused."""

WEIGHTS = replace(
    LLAMA_WEIGHTS,
    modules={
        **{name: ours for name, ours in LLAMA_WEIGHTS.modules.items() if not name.endswith(_SEPARATE)},
        "layers.*.self_attn.qkv_proj": "layers.*.attention.qkv",
        "layers.*.mlp.gate_up_proj": "layers.*.mlp.gate_up",
    },
    layouts={
        "layers.*.self_attn.qkv_proj": TensorLayout(("query", "key", "value")),
        "layers.*.mlp.gate_up_proj": TensorLayout(("gate", "up")),
    },
)


def phi3_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Phi3Config`: no biases, and rotary positions that may have two lists of frequencies."""
    return DecoderSpec(**gated_fields(config, partial=True), windows=attention_windows(config))


FAMILIES = (Family(("Phi3ForCausalLM",), phi3_spec, WEIGHTS),)
