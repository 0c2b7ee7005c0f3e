"""The families of Qwen 2 and 3 with experts (arXiv:2407.10671 and 2505.09388): `qwen2_moe_spec`, `qwen3_moe_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import RouterSpec
from ...weights.tensor_layout import TensorLayout
from ..expert_fields import expert_counts, expert_gate, layer_numbers
from ..family import Family
from ..hf_config import attention_windows, flag, positive_int
from ..spec import DecoderSpec, ExpertsSpec
from .llama import WEIGHTS as LLAMA_WEIGHTS
from .llama import gated_fields
from .qwen import qwen3_spec

__all__ = ["FAMILIES", "WEIGHTS", "qwen2_moe_spec", "qwen3_moe_spec", "shared_experts"]

WEIGHTS = replace(
    LLAMA_WEIGHTS,
    modules={
        **LLAMA_WEIGHTS.modules,
        "layers.*.mlp.gate": "layers.*.mlp.router.linear",
        "layers.*.mlp.experts.*.gate_proj": "layers.*.mlp.experts.*.gate",
        "layers.*.mlp.experts.*.up_proj": "layers.*.mlp.experts.*.up",
        "layers.*.mlp.experts.*.down_proj": "layers.*.mlp.experts.*.down",
        "layers.*.mlp.shared_expert.gate_proj": "layers.*.mlp.shared.gate_up.gate",
        "layers.*.mlp.shared_expert.up_proj": "layers.*.mlp.shared.gate_up.up",
        "layers.*.mlp.shared_expert.down_proj": "layers.*.mlp.shared.down",
        "layers.*.mlp.shared_expert_gate": "layers.*.mlp.shared_gate",
    },
    tensors={
        "layers.*.mlp.experts.gate_up_proj": "layers.*.mlp.experts.*.weight",
        "layers.*.mlp.experts.down_proj": "layers.*.mlp.experts.*.down.weight",
    },
    layouts={
        "layers.*.mlp.experts.gate_up_proj": TensorLayout(("gate", "up"), stacked=True),
        "layers.*.mlp.experts.down_proj": TensorLayout(stacked=True),
    },
)


def qwen2_moe_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Qwen2MoeConfig`: beside the experts is a gated network of all tokens."""
    return DecoderSpec(
        **gated_fields(config),
        windows=attention_windows(config),
        qkv_bias=flag(config, "qkv_bias", True),
        experts=shared_experts(config),
    )


def qwen3_moe_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Qwen3MoeConfig`: that of Qwen 3, with experts in some or all layers."""
    return replace(qwen3_spec(config), experts=_experts(config))


def shared_experts(config: Any) -> ExpertsSpec:
    """Returns the experts of a config, beside which is a gated network of all tokens."""
    return _experts(config, shared_size=positive_int(config, "shared_expert_intermediate_size"), shared_gate=True)


def _experts(config: Any, **shared: Any) -> ExpertsSpec:
    dense, step = layer_numbers(config, "mlp_only_layers"), positive_int(config, "decoder_sparse_step")
    layers = (layer for layer in range(config.num_hidden_layers) if (layer + 1) % step == 0 and layer not in dense)
    counts = expert_counts(config, "num_experts")
    return ExpertsSpec(
        layers=frozenset(layers),
        router=RouterSpec(**counts, renormalise=flag(config, "norm_topk_prob", False)),
        intermediate_size=positive_int(config, "moe_intermediate_size"),
        gate=expert_gate(config),
        **shared,
    )


FAMILIES = (
    Family(("Qwen2MoeForCausalLM",), qwen2_moe_spec, WEIGHTS),
    Family(("Qwen3MoeForCausalLM",), qwen3_moe_spec, WEIGHTS),
)
