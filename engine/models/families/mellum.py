"""The family of Mellum 2 (JetBrains, 2026): `mellum_spec`, Qwen 3 with experts and with positions by layer type."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import RouterSpec
from ..expert_fields import expert_counts, expert_gate
from ..family import Family
from ..hf_config import flag, positive_int
from ..spec import DecoderSpec, ExpertsSpec
from .qwen import qwen3_spec
from .qwen_moe import WEIGHTS as QWEN_WEIGHTS

__all__ = ["FAMILIES", "WEIGHTS", "mellum_spec"]

WEIGHTS = replace(QWEN_WEIGHTS, ignored_starts=("mtp.",))  # Layers that predict further tokens.


def mellum_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `MellumConfig`: `mlp_layer_types` says which layers have experts."""
    spec, kinds = qwen3_spec(config), config.mlp_layer_types
    is_list = isinstance(kinds, list | tuple) and len(kinds) == spec.num_layers
    if not is_list or not all(kind in ("dense", "sparse") for kind in kinds):
        raise UnsupportedModelError(
            f"config field 'mlp_layer_types' is {quote(kinds)}; it must say dense or sparse for each of the "
            f"{spec.num_layers} layers"
        )
    experts = ExpertsSpec(
        layers=frozenset(layer for layer, kind in enumerate(kinds) if kind == "sparse"),
        router=RouterSpec(**expert_counts(config, "num_experts"), renormalise=flag(config, "norm_topk_prob", True)),
        intermediate_size=positive_int(config, "moe_intermediate_size"),
        gate=expert_gate(config),
    )
    return replace(spec, experts=experts)


FAMILIES = (Family(("MellumForCausalLM",), mellum_spec, WEIGHTS),)
