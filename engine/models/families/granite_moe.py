"""The families of Granite 3 and 4 with experts and without states (IBM, 2024): `granite_moe_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import RouterSpec
from ...weights.tensor_layout import TensorLayout
from ..expert_fields import expert_counts, expert_gate
from ..family import Family
from ..spec import DecoderSpec, ExpertsSpec
from .granite import granite_spec
from .llama import WEIGHTS as LLAMA_WEIGHTS

__all__ = ["FAMILIES", "WEIGHTS", "granite_moe_spec"]

# Checkpoints have the first name of each pair, and transformers has the second one in memory.
_GATE_UP = ("layers.*.block_sparse_moe.input_linear.weight", "layers.*.block_sparse_moe.experts.gate_up_proj")
_DOWN = ("layers.*.block_sparse_moe.output_linear.weight", "layers.*.block_sparse_moe.experts.down_proj")

WEIGHTS = replace(
    LLAMA_WEIGHTS,
    modules={
        **LLAMA_WEIGHTS.modules,
        "layers.*.block_sparse_moe.router.layer": "layers.*.mlp.router.linear",
        "layers.*.block_sparse_moe.router": "layers.*.mlp.router.linear",
        "layers.*.shared_mlp.input_linear": "layers.*.mlp.shared.gate_up",
        "layers.*.shared_mlp.output_linear": "layers.*.mlp.shared.down",
    },
    tensors={
        **dict.fromkeys(_GATE_UP, "layers.*.mlp.experts.*.weight"),
        **dict.fromkeys(_DOWN, "layers.*.mlp.experts.*.down.weight"),
    },
    layouts={
        **dict.fromkeys(_GATE_UP, TensorLayout(("gate", "up"), stacked=True)),
        **dict.fromkeys(_DOWN, TensorLayout(stacked=True)),
        "layers.*.shared_mlp.input_linear": TensorLayout(("gate", "up")),
    },
)


def granite_moe_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GraniteMoeConfig` or `GraniteMoeSharedConfig`: Granite, with experts in every layer."""
    spec = granite_spec(config)
    shared_size = getattr(config, "shared_intermediate_size", 0)
    if type(shared_size) is not int or shared_size < 0:
        raise UnsupportedModelError(
            f"config field 'shared_intermediate_size' is {quote(shared_size)}; it must be a size"
        )
    experts = ExpertsSpec(
        layers=frozenset(range(spec.num_layers)),
        router=RouterSpec(**expert_counts(config, "num_local_experts")),
        intermediate_size=spec.intermediate_size,
        gate=expert_gate(config),
        shared_size=shared_size,
    )
    return replace(spec, experts=experts)


FAMILIES = (Family(("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"), granite_moe_spec, WEIGHTS),)
