"""The family of Mixtral (Jiang et al., 2024, arXiv:2401.04088): `mixtral_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import EXPERT_GATES, RouterSpec
from ..family import Family
from ..hf_config import attention_windows, one_of, positive_int
from ..spec import DecoderSpec, ExpertsSpec
from .llama import WEIGHTS as LLAMA_WEIGHTS
from .llama import gated_fields

__all__ = ["FAMILIES", "WEIGHTS", "mixtral_spec"]

WEIGHTS = replace(
    LLAMA_WEIGHTS,
    modules={
        **LLAMA_WEIGHTS.modules,
        "layers.*.block_sparse_moe.gate": "layers.*.mlp.router.linear",
        "layers.*.block_sparse_moe.experts.*.w1": "layers.*.mlp.experts.*.gate",
        "layers.*.block_sparse_moe.experts.*.w3": "layers.*.mlp.experts.*.up",
        "layers.*.block_sparse_moe.experts.*.w2": "layers.*.mlp.experts.*.down",
    },
)


def mixtral_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `MixtralConfig`: every layer has experts, and the chosen scores are renormalised."""
    fields = gated_fields(config)
    experts = ExpertsSpec(
        layers=frozenset(range(fields["num_layers"])),
        router=RouterSpec(
            num_experts=positive_int(config, "num_local_experts"),
            num_choices=positive_int(config, "num_experts_per_tok"),
        ),
        intermediate_size=fields["intermediate_size"],
        gate=EXPERT_GATES[one_of(config, "hidden_act", tuple(EXPERT_GATES))],
    )
    return DecoderSpec(**fields, windows=attention_windows(config), experts=experts)


FAMILIES = (Family(("MixtralForCausalLM",), mixtral_spec, WEIGHTS),)
