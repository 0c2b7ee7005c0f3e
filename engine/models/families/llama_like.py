"""Families that differ from Llama in biases, rotation, windows or activation alone.

These are Arcee (AFM), CWM of Meta, ERNIE 4.5 of Baidu and Helium of Kyutai, without experts, and Seed-OSS of ByteDance.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import ACTIVATIONS
from ..family import Family
from ..hf_config import attention_windows, flag, one_of, positive_float
from ..spec import DecoderSpec
from .llama import WEIGHTS, gated_fields, llama_spec, rotary_fields

__all__ = ["FAMILIES", "PLAIN_WEIGHTS", "arcee_spec", "cwm_spec", "ernie_spec", "helium_spec", "seed_oss_spec"]

PLAIN_WEIGHTS = replace(WEIGHTS, modules={**WEIGHTS.modules, "layers.*.mlp.up_proj": "layers.*.mlp.up"})
"""The names of Llama in models whose feed-forward networks have no gate."""


def arcee_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `ArceeConfig`: networks without a gate."""
    bias = flag(config, "attention_bias", False)
    return DecoderSpec(
        **rotary_fields(config),
        windows=(0,) * config.num_hidden_layers,
        rms_norm=True,
        norm_eps=positive_float(config, "rms_norm_eps", most=1.0),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=flag(config, "mlp_bias", False),
        gated_mlp=False,
        activation=one_of(config, "hidden_act", tuple(ACTIVATIONS)),
    )


def cwm_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `CwmConfig`: some layers have windows."""
    return DecoderSpec(
        **gated_fields(config), windows=attention_windows(config), mlp_bias=flag(config, "mlp_bias", False)
    )


def ernie_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `Ernie4_5Config`: neighbours are rotated, and all projections have biases, or none."""
    bias = flag(config, "use_bias", False)
    return DecoderSpec(
        **gated_fields(config, interleaved=True),
        windows=(0,) * config.num_hidden_layers,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
    )


def helium_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `HeliumConfig`: neighbours are rotated, and the output projection has no bias."""
    return DecoderSpec(
        **gated_fields(config, interleaved=True),
        windows=(0,) * config.num_hidden_layers,
        qkv_bias=flag(config, "attention_bias", False),
        mlp_bias=flag(config, "mlp_bias", False),
    )


def seed_oss_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `SeedOssConfig`: a flag of its own for the bias of the output projection."""
    return replace(llama_spec(config), attention_out_bias=flag(config, "attention_out_bias", False))


FAMILIES = (
    Family(("ArceeForCausalLM",), arcee_spec, PLAIN_WEIGHTS),
    Family(("CwmForCausalLM",), cwm_spec, WEIGHTS),
    Family(("Ernie4_5ForCausalLM",), ernie_spec, WEIGHTS),
    Family(("HeliumForCausalLM",), helium_spec, WEIGHTS),
    Family(("SeedOssForCausalLM",), seed_oss_spec, WEIGHTS),
)
