"""The families of Qwen3-Next and Qwen3.5, text (Qwen Team, 2025 and 2026): `qwen_next_spec`, `qwen3_5_spec`.

Three of four layers are gated delta networks; the others have attention whose results are gated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...layers import RouterSpec
from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..expert_fields import expert_counts, expert_gate
from ..family import Family
from ..hf_config import flag, positive_int
from ..spec import AttentionSpec, DecoderSpec, ExpertsSpec
from ..state_fields import delta_state, state_layers
from .llama import gated_fields
from .qwen_moe import WEIGHTS as MOE_WEIGHTS
from .qwen_moe import shared_experts

__all__ = ["FAMILIES", "qwen3_5_moe_spec", "qwen3_5_spec", "qwen_next_spec"]

_MODULES = {
    **MOE_WEIGHTS.modules,
    "layers.*.self_attn.q_proj": "layers.*.attention.qkv",
    "layers.*.linear_attn": "layers.*.attention",
    "layers.*.linear_attn.conv1d": "layers.*.attention.conv",
    "layers.*.linear_attn.norm": "layers.*.attention.norm",
    "layers.*.linear_attn.out_proj": "layers.*.attention.out_proj",
}


def qwen3_5_spec(config: Any, size_field: str = "intermediate_size") -> DecoderSpec:
    """Returns the spec of a `Qwen3_5TextConfig`: norms scale by `1 + weight`, and a part of each head is rotated."""
    attention_bias = flag(config, "attention_bias", False)
    return DecoderSpec(
        **gated_fields(config, size_field=size_field, partial=True),
        windows=(0,) * config.num_hidden_layers,
        attention=AttentionSpec(output_gate=True),
        state=delta_state(config, state_layers(config, "layer_types")),
        norm_unit_offset=True,
        qk_norm=True,
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
    )


def qwen3_5_moe_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Qwen3_5MoeTextConfig`: in every layer experts beside a gated network of all tokens."""
    spec = qwen3_5_spec(config, size_field="moe_intermediate_size")
    experts = ExpertsSpec(
        layers=frozenset(range(spec.num_layers)),
        router=RouterSpec(**expert_counts(config, "num_experts")),
        intermediate_size=spec.intermediate_size,
        gate=expert_gate(config),
        shared_size=positive_int(config, "shared_expert_intermediate_size"),
        shared_gate=True,
    )
    return replace(spec, experts=experts)


def qwen_next_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Qwen3NextConfig`: that of Qwen3.5, with experts beside a gated network of all tokens."""
    return replace(qwen3_5_spec(config), experts=shared_experts(config))


def _weights(spec: DecoderSpec, modules: Mapping[str, str], layouts: Mapping[str, TensorLayout]) -> WeightMap:
    """Returns a map of weights with the names and the layouts of the projections of gated delta networks."""
    stacked = {name: layout for name, layout in MOE_WEIGHTS.layouts.items() if spec.experts is not None}
    return replace(
        MOE_WEIGHTS,
        modules={**_MODULES, **modules},
        layouts={
            **stacked,
            "layers.*.self_attn.q_proj": TensorLayout(("query", "gate"), num_groups=spec.num_heads),
            "layers.*.linear_attn.conv1d": TensorLayout(("query", "key", "value")),
            **layouts,
        },
        ignored_starts=("mtp.",),  # Layers that predict further tokens.
    )


def qwen3_5_weights(spec: DecoderSpec) -> WeightMap:
    """Returns the map of the weights of Qwen3.5: query, key and value of a gated delta network are one matrix."""
    modules = {
        "layers.*.linear_attn.in_proj_qkv": "layers.*.attention.in_proj",
        "layers.*.linear_attn.in_proj_z": "layers.*.attention.in_proj.gate",
        "layers.*.linear_attn.in_proj_b": "layers.*.attention.in_proj.beta",
        "layers.*.linear_attn.in_proj_a": "layers.*.attention.in_proj.decay",
    }
    return _weights(spec, modules, {"layers.*.linear_attn.in_proj_qkv": TensorLayout(("query", "key", "value"))})


def qwen_next_weights(spec: DecoderSpec) -> WeightMap:
    """Returns the map of the weights of Qwen3-Next: the projections of each group of heads are together."""
    num_groups = 1 if spec.state is None else spec.state.num_groups
    modules = dict.fromkeys(
        ("layers.*.linear_attn.in_proj_qkvz", "layers.*.linear_attn.in_proj_ba"), "layers.*.attention.in_proj"
    )
    layouts = {
        "layers.*.linear_attn.in_proj_qkvz": TensorLayout(("query", "key", "value", "gate"), num_groups=num_groups),
        "layers.*.linear_attn.in_proj_ba": TensorLayout(("beta", "decay"), num_groups=num_groups),
    }
    return _weights(spec, modules, layouts)


FAMILIES = (
    Family(("Qwen3_5ForCausalLM",), qwen3_5_spec, qwen3_5_weights),
    Family(("Qwen3_5MoeForCausalLM",), qwen3_5_moe_spec, qwen3_5_weights),
    Family(("Qwen3NextForCausalLM",), qwen_next_spec, qwen_next_weights),
)
