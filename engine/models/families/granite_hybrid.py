"""The family of Granite 4 with states (IBM, 2025): `granite_hybrid_spec`. Most layers are Mamba-2 layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...weights.checkpoint import WeightMap
from ..family import Family
from ..hf_config import positive_int
from ..spec import DecoderSpec
from ..state_fields import mamba_state, state_layers
from .bamba import MAMBA_LAYOUTS, MAMBA_MODULES
from .granite import granite_spec
from .granite_moe import WEIGHTS as MOE_WEIGHTS
from .granite_moe import granite_moe_spec

__all__ = ["FAMILIES", "granite_hybrid_spec", "granite_hybrid_weights"]


def granite_hybrid_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GraniteMoeHybridConfig`: Granite, with experts and with rotary positions if it has any."""
    has_experts = getattr(config, "num_local_experts", 0) != 0
    positions = getattr(config, "position_embedding_type", None)
    if positions not in (None, "rope", "nope"):
        raise UnsupportedModelError(
            f"config field 'position_embedding_type' is {quote(positions)}; it can be rope, nope or null"
        )
    spec = granite_moe_spec(config) if has_experts else granite_spec(config)
    return replace(
        spec,
        intermediate_size=spec.intermediate_size if has_experts else positive_int(config, "shared_intermediate_size"),
        rope=spec.rope if positions == "rope" else None,
        state=mamba_state(config, state_layers(config, "layer_types")),
    )


def granite_hybrid_weights(spec: DecoderSpec) -> WeightMap:
    """Returns the map of the weights; without experts, the network of all tokens is the only one."""
    modules = {**MOE_WEIGHTS.modules, **MAMBA_MODULES}
    if spec.experts is None:
        modules["layers.*.shared_mlp.input_linear"] = "layers.*.mlp.gate_up"
        modules["layers.*.shared_mlp.output_linear"] = "layers.*.mlp.down"
    return replace(MOE_WEIGHTS, modules=modules, layouts={**MOE_WEIGHTS.layouts, **MAMBA_LAYOUTS})


FAMILIES = (Family(("GraniteMoeHybridForCausalLM",), granite_hybrid_spec, granite_hybrid_weights),)
