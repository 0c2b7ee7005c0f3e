"""The family of ERNIE 4.5 with experts (Baidu, 2025): `ernie4_5_moe_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import RouterSpec
from ...weights.tensor_layout import TensorLayout
from ..expert_fields import expert_counts, expert_gate
from ..family import Family
from ..hf_config import flag, positive_float, positive_int
from ..spec import DecoderSpec, ExpertsSpec
from .glm_moe import WEIGHTS as GLM_WEIGHTS
from .llama import gated_fields

__all__ = ["FAMILIES", "WEIGHTS", "ernie4_5_moe_spec"]

_CORRECTIONS = (
    "layers.*.mlp.moe_statics.e_score_correction_bias",
    "layers.*.mlp.gate.moe_statics.e_score_correction_bias",
)
WEIGHTS = replace(
    GLM_WEIGHTS,
    ignored_starts=("mtp_",),  # Layers that predict further tokens.
    tensors={**GLM_WEIGHTS.tensors, **dict.fromkeys(_CORRECTIONS, "layers.*.mlp.router.correction")},
    # Corrections are stacked too, but not by expert: they are matrices of one row.
    layouts={**GLM_WEIGHTS.layouts, **dict.fromkeys(_CORRECTIONS, TensorLayout(stacked=True))},
)


def ernie4_5_moe_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `Ernie4_5_MoeConfig`: neighbouring numbers are rotated, softmax scores are corrected."""
    if flag(config, "use_bias", False):
        raise UnsupportedModelError("config field 'use_bias' is true; an output head with a bias is not implemented")
    fields = gated_fields(config)
    fields["rope"] = replace(fields["rope"], interleaved=True)
    return DecoderSpec(**fields, windows=(0,) * config.num_hidden_layers, experts=_experts(config))


def _experts(config: Any) -> ExpertsSpec:
    every, num_shared = positive_int(config, "moe_layer_interval"), config.moe_num_shared_experts
    first, last = (_layer_index(config, f"moe_layer_{end}_index") for end in ("start", "end"))
    size = positive_int(config, "moe_intermediate_size")
    return ExpertsSpec(
        layers=frozenset(i for i in range(config.num_hidden_layers) if first <= i <= last and (i + 1) % every == 0),
        router=RouterSpec(
            **expert_counts(config, "moe_num_experts"),
            correction=True,
            min_total=positive_float(config, "moe_norm_min"),
        ),
        intermediate_size=size,
        gate=expert_gate(config),
        shared_size=size * positive_int(config, "moe_num_shared_experts") if num_shared else 0,
    )


def _layer_index(config: Any, field: str) -> int:
    index = getattr(config, field, None)
    if type(index) is not int:
        raise UnsupportedModelError(f"config field {field!r} is {quote(index)}; it must be the index of a layer")
    return index


FAMILIES = (Family(("Ernie4_5_MoeForCausalLM",), ernie4_5_moe_spec, WEIGHTS),)
