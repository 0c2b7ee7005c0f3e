"""The family of MiniMax-M2 (MiniMax, 2025), all layers of which have full attention: `minimax_m2_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import RouterSpec
from ..expert_fields import expert_counts, expert_gate
from ..family import Family
from ..spec import DecoderSpec, ExpertsSpec
from .llama import gated_fields
from .mixtral import WEIGHTS as MIXTRAL_WEIGHTS

__all__ = ["FAMILIES", "WEIGHTS", "minimax_m2_spec"]

_CORRECTION = "layers.*.mlp.router.correction"
WEIGHTS = replace(
    MIXTRAL_WEIGHTS,
    tensors={
        **MIXTRAL_WEIGHTS.tensors,
        "layers.*.block_sparse_moe.e_score_correction_bias": _CORRECTION,
        "layers.*.mlp.e_score_correction_bias": _CORRECTION,
    },
)


def minimax_m2_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `MiniMaxM2Config`: norms of all heads together, rotation of a part of each, sigmoids."""
    fields = gated_fields(config, partial=True)
    experts = ExpertsSpec(
        layers=frozenset(range(fields["num_layers"])),
        router=RouterSpec(**expert_counts(config, "num_local_experts"), scores="sigmoid", correction=True),
        intermediate_size=fields["intermediate_size"],
        gate=expert_gate(config),
    )
    windows = (0,) * config.num_hidden_layers
    return DecoderSpec(**fields, windows=windows, qk_norm=True, qk_norm_form="projection", experts=experts)


FAMILIES = (Family(("MiniMaxM2ForCausalLM",), minimax_m2_spec, WEIGHTS),)
