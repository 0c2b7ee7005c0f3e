"""The family of Mixtral (Jiang et al., 2024, arXiv:2401.04088): `mixtral_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import RouterSpec
from ..expert_fields import expert_counts, expert_gate
from ..family import Family
from ..hf_config import attention_windows
from ..spec import DecoderSpec, ExpertsSpec
from .llama import gated_fields
from .qwen_moe import WEIGHTS as QWEN_WEIGHTS

__all__ = ["FAMILIES", "WEIGHTS", "mixtral_spec"]

WEIGHTS = replace(
    QWEN_WEIGHTS,
    modules={
        **QWEN_WEIGHTS.modules,
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
        router=RouterSpec(**expert_counts(config, "num_local_experts")),
        intermediate_size=fields["intermediate_size"],
        gate=expert_gate(config),
    )
    return DecoderSpec(**fields, windows=attention_windows(config), experts=experts)


FAMILIES = (Family(("MixtralForCausalLM",), mixtral_spec, WEIGHTS),)
