"""The families of OLMoE and FlexOlmo (Ai2, arXiv:2409.02060 and 2507.07024): `olmoe_spec`, `flex_olmo_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import RouterSpec
from ..expert_fields import expert_counts, expert_gate
from ..family import Family
from ..hf_config import flag
from ..spec import DecoderSpec, ExpertsSpec
from .olmo import OLMO2_WEIGHTS, olmo2_spec
from .qwen_moe import WEIGHTS

__all__ = ["FAMILIES", "FLEX_WEIGHTS", "flex_olmo_spec", "olmoe_spec"]

FLEX_WEIGHTS = replace(WEIGHTS, modules={**WEIGHTS.modules, **OLMO2_WEIGHTS.modules})


def olmoe_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `OlmoeConfig`: heads are normed as in OLMo 2, layers as in Llama; experts everywhere."""
    if getattr(config, "clip_qkv", None) is not None:
        raise UnsupportedModelError(
            f"config field 'clip_qkv' is {quote(config.clip_qkv)}; limits on normed queries are not implemented"
        )
    return replace(flex_olmo_spec(config), norm_placement="before")


def flex_olmo_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `FlexOlmoConfig`: OLMo 2 with experts in every layer."""
    spec = olmo2_spec(config)
    experts = ExpertsSpec(
        layers=frozenset(range(spec.num_layers)),
        router=RouterSpec(**expert_counts(config, "num_experts"), renormalise=flag(config, "norm_topk_prob", False)),
        intermediate_size=spec.intermediate_size,
        gate=expert_gate(config),
    )
    return replace(spec, experts=experts)


FAMILIES = (
    Family(("OlmoeForCausalLM",), olmoe_spec, WEIGHTS),
    Family(("FlexOlmoForCausalLM",), flex_olmo_spec, FLEX_WEIGHTS),
)
