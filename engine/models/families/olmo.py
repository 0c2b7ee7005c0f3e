"""The families of OLMo 1, 2 and 3 (Ai2, 2024 and 2025), without experts: `olmo_spec`, `olmo2_spec`, `olmo3_spec`.

Their papers are arXiv:2402.00838 and 2501.00656.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import GATES
from ..family import Family
from ..hf_config import attention_windows, flag, one_of, positive_float
from ..spec import DecoderSpec
from .llama import WEIGHTS, gated_fields, rotary_fields

__all__ = ["FAMILIES", "OLMO2_WEIGHTS", "olmo2_spec", "olmo3_spec", "olmo_spec"]

OLMO2_WEIGHTS = replace(
    WEIGHTS,
    modules={
        **WEIGHTS.modules,
        "layers.*.post_attention_layernorm": "layers.*.attention_out_norm",
        "layers.*.post_feedforward_layernorm": "layers.*.mlp_out_norm",
    },
)


def olmo_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `OlmoConfig`: layer norms without weights, and a limit on queries, keys and values."""
    return DecoderSpec(
        **rotary_fields(config),
        **_attention_biases(config),
        windows=(0,) * config.num_hidden_layers,
        rms_norm=False,
        norm_eps=1e-5,
        norm_affine=False,
        gated_mlp=True,
        activation=one_of(config, "hidden_act", tuple(GATES)),
        qkv_limit=0.0 if getattr(config, "clip_qkv", None) is None else positive_float(config, "clip_qkv"),
    )


def olmo2_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `Olmo2Config`: norms after the sublayers, and of all query or key heads together."""
    return DecoderSpec(
        **gated_fields(config),
        **_attention_biases(config),
        windows=(0,) * config.num_hidden_layers,
        norm_placement="output",
        qk_norm=True,
        qk_norm_form="projection",
    )


def olmo3_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `Olmo3Config`: OLMo 2 with windows, and rotary positions by layer type."""
    return replace(olmo2_spec(config), windows=attention_windows(config))


def _attention_biases(config: Any) -> dict[str, Any]:
    bias = flag(config, "attention_bias", False)
    return {"qkv_bias": bias, "attention_out_bias": bias}


FAMILIES = (
    Family(("OlmoForCausalLM",), olmo_spec, WEIGHTS),
    Family(("Olmo2ForCausalLM",), olmo2_spec, OLMO2_WEIGHTS),
    Family(("Olmo3ForCausalLM",), olmo3_spec, OLMO2_WEIGHTS),
)
