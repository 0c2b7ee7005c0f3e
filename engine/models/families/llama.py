"""The families of Llama (Touvron et al., 2023, arXiv:2302.13971) and Mistral: `llama_spec`, `mistral_spec`."""

from __future__ import annotations

from typing import Any

from ...layers import GATES
from ...weights.checkpoint import WeightMap
from ..family import Family
from ..hf_config import attention_windows, flag, head_counts, one_of, positive_float, positive_int
from ..rope import rope_fields, rope_max_positions
from ..spec import DecoderSpec

__all__ = ["FAMILIES", "WEIGHTS", "gated_fields", "llama_spec", "mistral_spec", "rotary_fields"]

WEIGHTS = WeightMap(
    prefixes=("model.",),
    modules={
        "embed_tokens": "embed_tokens",
        "layers.*.input_layernorm": "layers.*.attention_norm",
        "layers.*.self_attn": "layers.*.attention.kv_scales",
        "layers.*.self_attn.q_proj": "layers.*.attention.qkv.query",
        "layers.*.self_attn.k_proj": "layers.*.attention.qkv.key",
        "layers.*.self_attn.v_proj": "layers.*.attention.qkv.value",
        "layers.*.self_attn.q_norm": "layers.*.attention.rotate_and_store.q_norm",
        "layers.*.self_attn.k_norm": "layers.*.attention.rotate_and_store.k_norm",
        "layers.*.self_attn.o_proj": "layers.*.attention.out",
        "layers.*.post_attention_layernorm": "layers.*.mlp_norm",
        "layers.*.mlp.gate_proj": "layers.*.mlp.gate_up.gate",
        "layers.*.mlp.up_proj": "layers.*.mlp.gate_up.up",
        "layers.*.mlp.down_proj": "layers.*.mlp.down",
        "norm": "norm",
        "lm_head": "lm_head",
        "score": "score",
        "score.0": "score.dense",
        "score.2": "score.out",
    },
    ignored=("rotary_emb", "layers.*.self_attn.rotary_emb"),
    numbered_parts=("score",),
)


def rotary_fields(
    config: Any, *, tied: bool = False, size_field: str = "intermediate_size", **rope: bool
) -> dict[str, Any]:
    """Returns the `DecoderSpec` fields that are read alike for all models with rotary positions.

    Args:
        config: A transformers config.
        tied: Whether the head is tied to the embedding in a config that does not say it.
        size_field: Name of the field with the width inside a feed-forward network.
        **rope: What `rope_fields` takes: how models of the architecture rotate.
    """
    return {
        "vocab_size": positive_int(config, "vocab_size"),
        "hidden_size": positive_int(config, "hidden_size"),
        "intermediate_size": positive_int(config, size_field),
        "num_layers": positive_int(config, "num_hidden_layers"),
        **head_counts(config),
        "max_position_embeddings": rope_max_positions(config),
        "embedding_size": config.hidden_size,
        "tie_word_embeddings": flag(config, "tie_word_embeddings", tied),
        **rope_fields(config, **rope),
    }


def gated_fields(
    config: Any, *, activation_field: str = "hidden_act", size_field: str = "intermediate_size", **rope: bool
) -> dict[str, Any]:
    """Returns the `DecoderSpec` fields that are read alike for all models with RMSNorm, RoPE and a gated network.

    Args:
        config: A transformers config.
        activation_field: Name of the field with the activation of the feed-forward network.
        size_field: As in `rotary_fields`.
        **rope: As in `rotary_fields`.
    """
    return {
        **rotary_fields(config, size_field=size_field, **rope),
        "rms_norm": True,
        "norm_eps": positive_float(config, "rms_norm_eps", most=1.0),
        "gated_mlp": True,
        "activation": one_of(config, activation_field, tuple(GATES)),
    }


def llama_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `LlamaConfig`: its flags set the biases, and all layers have full attention."""
    attention_bias = flag(config, "attention_bias", False)
    return DecoderSpec(
        **gated_fields(config),
        windows=(0,) * config.num_hidden_layers,
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias", False),
    )


def mistral_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `MistralConfig` or `MinistralConfig`: no biases, and windows if the config has any."""
    return DecoderSpec(**gated_fields(config), windows=attention_windows(config))


FAMILIES = (
    Family(("LlamaForCausalLM", "LLaMAForCausalLM"), llama_spec, WEIGHTS),
    Family(("MistralForCausalLM", "MinistralForCausalLM"), mistral_spec, WEIGHTS),
)
