"""The family of StableLM (Bellagente et al., 2024, arXiv:2402.17834): `stablelm_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import GATES
from ..family import Family
from ..hf_config import flag, one_of, positive_float
from ..spec import DecoderSpec
from .llama import WEIGHTS as LLAMA_WEIGHTS
from .llama import rotary_fields

__all__ = ["FAMILIES", "WEIGHTS", "stablelm_spec"]

WEIGHTS = replace(
    LLAMA_WEIGHTS,
    modules={
        **LLAMA_WEIGHTS.modules,
        "layers.*.self_attn.q_layernorm.norms.*": "layers.*.attention.rotate_and_store.q_norm.norms.*",
        "layers.*.self_attn.k_layernorm.norms.*": "layers.*.attention.rotate_and_store.k_norm.norms.*",
    },
)


def stablelm_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `StableLmConfig`: layer norms, and rotary positions in a part of each head."""
    is_parallel = flag(config, "use_parallel_residual", False)
    return DecoderSpec(
        **rotary_fields(config, partial=True),
        windows=(0,) * config.num_hidden_layers,
        rms_norm=False,
        norm_eps=positive_float(config, "layer_norm_eps", most=1.0),
        parallel=is_parallel,
        shared_norm=is_parallel,
        qkv_bias=flag(config, "use_qkv_bias", False),
        qk_norm=flag(config, "qk_layernorm", False),
        qk_norm_form="per head",
        gated_mlp=True,
        activation=one_of(config, "hidden_act", tuple(GATES)),
    )


FAMILIES = (Family(("StableLmForCausalLM",), stablelm_spec, WEIGHTS),)
