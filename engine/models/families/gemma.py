"""The families of Gemma (Gemma Team, 2024 and 2025): `gemma_spec`, `gemma2_spec`, `gemma3_spec`.

Their papers are arXiv:2403.08295, 2408.00118 and 2503.19786. Of Gemma 3 this is the part that reads text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError
from ..family import Family
from ..hf_config import attention_windows, flag, positive_float
from ..spec import AttentionSpec, DecoderSpec
from .llama import WEIGHTS, gated_fields

__all__ = ["FAMILIES", "GEMMA2_WEIGHTS", "VAULT_WEIGHTS", "gemma2_spec", "gemma3_spec", "gemma_spec", "vaultgemma_spec"]

GEMMA2_WEIGHTS = replace(
    WEIGHTS,
    modules={
        **WEIGHTS.modules,
        "layers.*.post_attention_layernorm": "layers.*.attention_out_norm",
        "layers.*.pre_feedforward_layernorm": "layers.*.mlp_norm",
        "layers.*.post_feedforward_layernorm": "layers.*.mlp_out_norm",
    },
)

VAULT_WEIGHTS = replace(WEIGHTS, modules={**WEIGHTS.modules, "layers.*.pre_feedforward_layernorm": "layers.*.mlp_norm"})


def gemma_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GemmaConfig`: embeddings are scaled, and norms scale by `1 + weight`."""
    _check_causal(config)
    return DecoderSpec(**_common_fields(config, "hidden_act"), windows=(0,) * config.num_hidden_layers)


def gemma2_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Gemma2Config`: norms around each sublayer, softcaps on scores and logits, some windows."""
    _check_causal(config)
    return _gemma2_spec(config)


def _gemma2_spec(config: Any) -> DecoderSpec:
    return DecoderSpec(
        **_common_fields(config, "hidden_activation"),
        windows=attention_windows(config),
        attention=AttentionSpec(
            scale=positive_float(config, "query_pre_attn_scalar") ** -0.5,
            softcap=_softcap(config, "attn_logit_softcapping"),
        ),
        norm_placement="both",
        logit_softcap=_softcap(config, "final_logit_softcapping"),
    )


def gemma3_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Gemma3TextConfig`: Gemma 2 with normed heads, and rotary positions by layer type."""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(
            "config field 'attn_logit_softcapping' is set; the scores of Gemma 3 have no softcap, so set it to null"
        )
    return replace(_gemma2_spec(config), qk_norm=True)


def vaultgemma_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `VaultGemmaConfig`: Gemma 2 without the norms after the sublayers."""
    return replace(gemma2_spec(config), norm_placement="before")


def _check_causal(config: Any) -> None:
    """Raises if a model attends to later tokens, which transformers does in some parts of Gemma 1 and 2 only."""
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(
            "config field 'use_bidirectional_attention' is true; of Gemma only version 3 attends to later tokens here"
        )


def _common_fields(config: Any, activation_field: str) -> dict[str, Any]:
    """Returns the `DecoderSpec` fields that are read alike for all versions."""
    attention_bias = flag(config, "attention_bias", False)
    return {
        **gated_fields(config, activation_field=activation_field),
        "embedding_scale": config.hidden_size**0.5,
        "norm_unit_offset": True,
        "qkv_bias": attention_bias,
        "attention_out_bias": attention_bias,
    }


def _softcap(config: Any, field: str) -> float:
    """Returns the softcap in a field of the config; 0 if the field is missing or None."""
    return 0.0 if getattr(config, field, None) is None else positive_float(config, field)


FAMILIES = (
    Family(("GemmaForCausalLM",), gemma_spec, WEIGHTS),
    Family(("Gemma2ForCausalLM",), gemma2_spec, GEMMA2_WEIGHTS),
    Family(("Gemma3ForCausalLM", "Gemma3TextModel"), gemma3_spec, GEMMA2_WEIGHTS),
    Family(("VaultGemmaForCausalLM",), vaultgemma_spec, VAULT_WEIGHTS),
)
