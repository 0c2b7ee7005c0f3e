"""The family of StarCoder 2 (Lozhkov et al., 2024, arXiv:2402.19173): `starcoder2_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import ACTIVATIONS
from ..family import Family
from ..hf_config import attention_windows, flag, one_of, positive_float
from ..spec import DecoderSpec
from .llama import WEIGHTS as LLAMA_WEIGHTS
from .llama import rotary_fields

__all__ = ["FAMILIES", "WEIGHTS", "starcoder2_spec"]

WEIGHTS = replace(
    LLAMA_WEIGHTS,
    modules={
        **LLAMA_WEIGHTS.modules,
        "layers.*.mlp.c_fc": "layers.*.mlp.up",
        "layers.*.mlp.c_proj": "layers.*.mlp.down",
    },
)


def starcoder2_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Starcoder2Config`: rotary positions, layer norms, networks without gate, biases."""
    bias = flag(config, "use_bias", True)
    return DecoderSpec(
        **rotary_fields(config, tied=True),
        windows=attention_windows(config),
        rms_norm=False,
        norm_eps=positive_float(config, "norm_epsilon", most=1.0),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        gated_mlp=False,
        activation=one_of(config, "hidden_act", tuple(ACTIVATIONS)),
    )


FAMILIES = (Family(("Starcoder2ForCausalLM",), starcoder2_spec, WEIGHTS),)
