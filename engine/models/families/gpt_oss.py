"""The family of gpt-oss (OpenAI, 2025, arXiv:2508.10925): `gpt_oss_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import RouterSpec
from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..expert_fields import expert_counts
from ..family import Family
from ..hf_config import attention_windows, flag
from ..spec import AttentionSpec, DecoderSpec, ExpertsSpec
from .llama import WEIGHTS as LLAMA_WEIGHTS
from .llama import gated_fields

__all__ = ["FAMILIES", "gpt_oss_spec", "gpt_oss_weights"]

_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
"""Fields of the config -> the numbers of the kernels' `clamped_swiglu`."""

_EXPERTS = "layers.*.mlp.experts"


def gpt_oss_weights(spec: DecoderSpec) -> WeightMap:
    """Returns the names of a model's weights. Rows of gate and up take turns; matrices in MXFP4 are not transposed."""
    fused: dict[str, Any] = {"parts": ("gate", "up"), "num_groups": spec.intermediate_size, "stacked": True}
    return replace(
        LLAMA_WEIGHTS,
        modules={**LLAMA_WEIGHTS.modules, "layers.*.mlp.router": "layers.*.mlp.router.linear"},
        tensors={
            "layers.*.self_attn.sinks": "layers.*.attention.sinks",
            f"{_EXPERTS}.gate_up_proj": f"{_EXPERTS}.*.weight",
            f"{_EXPERTS}.gate_up_proj.weight": f"{_EXPERTS}.*.weight",
            f"{_EXPERTS}.gate_up_proj_bias": f"{_EXPERTS}.*.bias",
            f"{_EXPERTS}.down_proj": f"{_EXPERTS}.*.down.weight",
            f"{_EXPERTS}.down_proj.weight": f"{_EXPERTS}.*.down.weight",
            f"{_EXPERTS}.down_proj_bias": f"{_EXPERTS}.*.down.bias",
        },
        layouts={
            f"{_EXPERTS}.gate_up_proj": TensorLayout(**fused, transposed=True),
            f"{_EXPERTS}.gate_up_proj.weight": TensorLayout(**fused),
            f"{_EXPERTS}.gate_up_proj_bias": TensorLayout(**fused),
            f"{_EXPERTS}.down_proj": TensorLayout(stacked=True, transposed=True),
            f"{_EXPERTS}.down_proj.weight": TensorLayout(stacked=True),
            f"{_EXPERTS}.down_proj_bias": TensorLayout(stacked=True),
        },
    )


def gpt_oss_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GptOssConfig`: sinks in the attention, biases, experts with a clamped gate."""
    for field, number in _SWIGLU.items():
        if getattr(config, field, number) != number:
            raise UnsupportedModelError(
                f"config field {field!r} is {quote(getattr(config, field))}; implemented is {number}"
            )
    fields, bias = gated_fields(config), flag(config, "attention_bias", True)
    experts = ExpertsSpec(
        layers=frozenset(range(fields["num_layers"])),
        router=RouterSpec(**expert_counts(config, "num_local_experts"), bias=True),
        intermediate_size=fields["intermediate_size"],
        gate="clamped_swiglu",
        bias=True,
    )
    return DecoderSpec(
        **fields,
        windows=attention_windows(config),
        attention=AttentionSpec(sinks=True),
        qkv_bias=bias,
        attention_out_bias=bias,
        experts=experts,
    )


FAMILIES = (Family(("GptOssForCausalLM",), gpt_oss_spec, gpt_oss_weights),)
