"""The family of Falcon (Almazrouei et al., 2023, arXiv:2311.16867), both decoders and Falcon-RW: `falcon_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...errors import UnsupportedModelError, quote
from ...layers import ACTIVATIONS
from ...weights.checkpoint import WeightMap
from ..alibi import alibi_slopes
from ..family import Family
from ..hf_config import flag, one_of, positive_float, positive_int, whole_heads
from ..rope import rope_max_positions, rope_spec
from ..spec import AttentionSpec, DecoderSpec
from .bloom import bloom_weights

__all__ = ["FAMILIES", "falcon_spec"]


def falcon_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `FalconConfig`."""
    bias, heads = flag(config, "bias", False), whole_heads(config)
    return DecoderSpec(
        vocab_size=positive_int(config, "vocab_size"),
        **heads,
        intermediate_size=positive_int(config, "ffn_hidden_size"),
        num_layers=positive_int(config, "num_hidden_layers"),
        num_kv_heads=_num_kv_heads(config, heads["num_heads"]),
        windows=(0,) * config.num_hidden_layers,
        embedding_size=config.hidden_size,
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
        rms_norm=False,
        norm_eps=positive_float(config, "layer_norm_epsilon", most=1.0),
        **_block_fields(config),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        gated_mlp=False,
        activation=one_of(config, "activation", tuple(ACTIVATIONS)),
        **_position_fields(config, heads["num_heads"], heads["head_dim"]),
    )


def _num_kv_heads(config: Any, num_heads: int) -> int:
    """Returns the number of KV heads; only the new decoder has groups of query heads, the old one has one KV head."""
    is_new, num_kv_heads = flag(config, "new_decoder_architecture", False), positive_int(config, "num_kv_heads")
    if not is_new and flag(config, "multi_query", True):
        return 1
    if num_heads % num_kv_heads or (not is_new and num_kv_heads != num_heads):
        raise UnsupportedModelError(
            f"config field 'num_kv_heads' is {num_kv_heads}; with num_attention_heads={num_heads} and "
            f"new_decoder_architecture={is_new} it must {'divide' if is_new else 'equal'} the number of heads"
        )
    return num_kv_heads


def _block_fields(config: Any) -> dict[str, Any]:
    """Returns the fields of the sublayers: in turn, or side by side with a norm for each or one for both."""
    is_new, parallel = flag(config, "new_decoder_architecture", False), flag(config, "parallel_attn", True)
    num_norms = getattr(config, "num_ln_in_parallel_attn", None) or (2 if is_new else 1)
    if num_norms not in ((1, 2) if is_new else (1,)):
        raise UnsupportedModelError(
            f"config field 'num_ln_in_parallel_attn' is {quote(num_norms)}; with new_decoder_architecture={is_new} it "
            f"can be {'1 or 2' if is_new else '1'}"
        )
    if is_new and not parallel:
        raise UnsupportedModelError("config field 'parallel_attn' is false; with new_decoder_architecture it is true")
    return {"parallel": parallel, "shared_norm": parallel and num_norms == 1}


def _position_fields(config: Any, num_heads: int, head_dim: int) -> dict[str, Any]:
    """Returns the fields of positions: rotary ones, or ALiBi, whose slopes are rounded to bfloat16 and then scaled.

    transformers also rounds their products with positions to bfloat16, which moves scores far into a long prompt.
    """
    if not flag(config, "alibi", False):
        return {"rope": rope_spec(config), "max_position_embeddings": rope_max_positions(config)}
    slopes = torch.tensor(alibi_slopes(num_heads)).bfloat16().float() * head_dim**-0.5
    return {
        "attention": AttentionSpec(alibi_slopes=tuple(slopes.tolist())),
        "max_position_embeddings": positive_int(config, "max_position_embeddings"),
    }


def _weights(spec: DecoderSpec) -> WeightMap:
    weights = bloom_weights(spec)
    two_norms = {"h.*.ln_attn": "layers.*.attention_norm", "h.*.ln_mlp": "layers.*.mlp_norm"}
    return replace(weights, modules={**weights.modules, **two_norms}, ignored=("h.*.self_attention.rotary_emb",))


FAMILIES = (Family(("FalconForCausalLM",), falcon_spec, _weights),)
