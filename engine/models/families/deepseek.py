"""The families of DeepSeek-V2 and V3 (R1, Kimi-K2), and of GLM-4.7-Flash and Youtu-LLM, which have their attention.

DeepSeek-AI, 2024, arXiv:2405.04434 and 2412.19437.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import RouterSpec
from ...weights.checkpoint import WeightMap
from ..expert_fields import corrected_router, expert_counts, group_counts, layers_after
from ..family import Family
from ..hf_config import flag, is_positive_number, one_of, positive_float, positive_int
from ..spec import AttentionSpec, DecoderSpec, LatentSpec
from .glm_moe import WEIGHTS as EXPERT_WEIGHTS
from .glm_moe import corrected_experts, shared_experts
from .llama import gated_fields

__all__ = [
    "FAMILIES",
    "WEIGHTS",
    "deepseek2_spec",
    "deepseek3_spec",
    "glm4_moe_lite_spec",
    "latent_fields",
    "youtu_spec",
]

WEIGHTS = replace(
    EXPERT_WEIGHTS,
    modules={
        **EXPERT_WEIGHTS.modules,
        "layers.*.self_attn.q_proj": "layers.*.attention.down.query",
        "layers.*.self_attn.q_a_proj": "layers.*.attention.down.query_latent",
        "layers.*.self_attn.q_a_layernorm": "layers.*.attention.query_norm",
        "layers.*.self_attn.q_b_proj": "layers.*.attention.query_up",
        "layers.*.self_attn.kv_a_proj_with_mqa": "layers.*.attention.down.latent",
        "layers.*.self_attn.kv_a_layernorm": "layers.*.attention.latent_norm",
        "layers.*.self_attn.kv_b_proj": "layers.*.attention.up",
    },
)

LATENT_NORM_EPS = 1e-6
"""What the norms of latents add to the mean square. No config has a field for it; `rms_norm_eps` is not it."""


def latent_fields(config: Any, *, interleaved: bool) -> dict[str, Any]:
    """Returns the `DecoderSpec` fields that are read alike for all models with latent attention.

    Args:
        config: A transformers config.
        interleaved: Whether neighbouring numbers are rotated as a pair.

    Raises:
        UnsupportedModelError: A field is missing, or its value is not implemented.
    """
    fields, bias = gated_fields(config), flag(config, "attention_bias", False)
    latent = LatentSpec(
        rank=positive_int(config, "kv_lora_rank"),
        rope_dim=positive_int(config, "qk_rope_head_dim"),
        nope_dim=positive_int(config, "qk_nope_head_dim"),
        value_dim=positive_int(config, "v_head_dim"),
        query_rank=None if config.q_lora_rank is None else positive_int(config, "q_lora_rank"),
        down_bias=bias,
        norm_eps=LATENT_NORM_EPS,
    )
    head_dim, num_heads = latent.nope_dim + latent.rope_dim, fields["num_heads"]
    if 2 * len(fields["rope"].inv_freq) != latent.rope_dim:
        raise _unsupported("head_dim", config.head_dim, f"qk_rope_head_dim={latent.rope_dim}, and even")
    if fields["num_kv_heads"] != num_heads:
        raise _unsupported("num_key_value_heads", fields["num_kv_heads"], f"num_attention_heads={num_heads}")
    if latent.value_dim > head_dim:
        raise _unsupported("v_head_dim", latent.value_dim, f"at most the {head_dim} numbers of a key")
    if bias and latent.query_rank is None:
        raise _unsupported("attention_bias", bias, "false if q_lora_rank is null")
    return {
        **fields,
        "head_dim": head_dim,
        "windows": (0,) * fields["num_layers"],
        "latent": latent,
        "rope": replace(fields["rope"], interleaved=interleaved),
        "attention": AttentionSpec(scale=_scale(config.rope_parameters, head_dim)),
        "attention_out_bias": bias,
    }


def weights_without_predictor(spec: DecoderSpec) -> WeightMap:
    """Returns the names of a model's weights, without the layer behind the last one, which predicts further tokens."""
    return replace(WEIGHTS, ignored_starts=(f"layers.{spec.num_layers}.",))


def deepseek2_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `DeepseekV2Config`: experts by a softmax over all of them, or over the best groups."""
    _check_value(config, "moe_layer_freq", 1)
    _check_value(config, "scoring_func", "softmax")
    _check_value(config, "norm_topk_prob", False)
    counts = expert_counts(config, "n_routed_experts")
    in_groups = one_of(config, "topk_method", ("greedy", "group_limited_greedy")) != "greedy"
    router = RouterSpec(
        **counts,
        **(group_counts(config, counts) if in_groups else {}),
        renormalise=False,
        scale=positive_float(config, "routed_scaling_factor"),
    )
    mlp_bias, experts = flag(config, "mlp_bias", False), shared_experts(config, router, layers_after(config))
    return DecoderSpec(**latent_fields(config, interleaved=True), experts=experts, mlp_bias=mlp_bias)


def deepseek3_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `DeepseekV3Config`: experts by sigmoids with a correction, in groups."""
    _check_value(config, "moe_layer_freq", 1)
    _check_value(config, "scoring_func", "sigmoid")
    _check_value(config, "topk_method", "noaux_tc")
    fields = latent_fields(config, interleaved=flag(config, "rope_interleave", True))
    return DecoderSpec(**fields, experts=corrected_experts(config))


def glm4_moe_lite_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Glm4MoeLiteConfig`: DeepSeek-V3, but a list says which layers have experts."""
    fields, kinds = latent_fields(config, interleaved=flag(config, "rope_interleave", True)), config.mlp_layer_types
    if len(kinds) != fields["num_layers"] or not set(kinds) <= {"dense", "sparse"}:
        raise UnsupportedModelError(
            f"config field 'mlp_layer_types' is {quote(kinds)}; it must say dense or sparse for each layer"
        )
    layers = frozenset(layer for layer, kind in enumerate(kinds) if kind == "sparse")
    return DecoderSpec(**fields, experts=shared_experts(config, corrected_router(config), layers))


def youtu_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `YoutuConfig`: latent attention, and a gated network without biases in every layer."""
    return DecoderSpec(**latent_fields(config, interleaved=flag(config, "rope_interleave", True)))


def _scale(rope: dict[str, Any], head_dim: int) -> float:
    """Returns the factor on scores: with `mscale_all_dim`, a longer context makes them sharper (Peng et al., 2023)."""
    all_dim: Any = rope.get("mscale_all_dim")
    if rope["rope_type"] == "default" or not all_dim:
        return float(head_dim**-0.5)
    factor: Any = rope.get("factor")
    if not is_positive_number(factor):
        raise _unsupported("factor", quote(factor), "a positive number if rope_parameters have mscale_all_dim")
    return float(head_dim**-0.5 * (0.1 * all_dim * math.log(max(factor, 1.0)) + 1) ** 2)


def _check_value(config: Any, field: str, implemented: Any) -> None:
    """Raises if a field that configs may lack has another value than the one that is implemented."""
    value = getattr(config, field, None)
    if value is not None and value != implemented:
        raise UnsupportedModelError(f"config field {field!r} is {quote(value)}; only {implemented!r} is implemented")


def _unsupported(field: str, value: Any, asked: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"config field {field!r} is {value}; with latent attention it must be {asked}")


FAMILIES = (
    Family(("DeepseekV2ForCausalLM",), deepseek2_spec, WEIGHTS),
    Family(("DeepseekV3ForCausalLM",), deepseek3_spec, weights_without_predictor),
    Family(("Glm4MoeLiteForCausalLM",), glm4_moe_lite_spec, weights_without_predictor),
    Family(("YoutuForCausalLM",), youtu_spec, WEIGHTS),
)
