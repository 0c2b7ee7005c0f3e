"""The family of Gemma 2 (Gemma Team, 2024, arXiv:2408.00118): `gemma2_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..family import Family
from ..hf_config import attention_windows, flag, positive_float
from ..spec import AttentionSpec, DecoderSpec
from .llama import WEIGHTS as LLAMA_WEIGHTS
from .llama import gated_fields

__all__ = ["FAMILIES", "WEIGHTS", "gemma2_spec"]

WEIGHTS = replace(
    LLAMA_WEIGHTS,
    modules={
        **LLAMA_WEIGHTS.modules,
        "layers.*.post_attention_layernorm": "layers.*.attention_out_norm",
        "layers.*.pre_feedforward_layernorm": "layers.*.mlp_norm",
        "layers.*.post_feedforward_layernorm": "layers.*.mlp_out_norm",
    },
)


def gemma2_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Gemma2Config`: norms around each sublayer, softcaps on scores and logits, some windows."""
    attention_bias = flag(config, "attention_bias", False)
    return DecoderSpec(
        **gated_fields(config, activation_field="hidden_activation"),
        windows=attention_windows(config),
        attention=AttentionSpec(
            scale=positive_float(config, "query_pre_attn_scalar") ** -0.5,
            softcap=_softcap(config, "attn_logit_softcapping"),
        ),
        embedding_scale=config.hidden_size**0.5,
        norm_placement="both",
        norm_unit_offset=True,
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        logit_softcap=_softcap(config, "final_logit_softcapping"),
    )


def _softcap(config: Any, field: str) -> float:
    """Returns the softcap in a field of the config; 0 if the field is missing or None."""
    return 0.0 if getattr(config, field, None) is None else positive_float(config, field)


FAMILIES = (Family(("Gemma2ForCausalLM",), gemma2_spec, WEIGHTS),)
