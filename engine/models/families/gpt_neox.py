"""The family of GPT-NeoX (Black et al., 2022, arXiv:2204.06745) and Pythia: `gpt_neox_spec`."""

from __future__ import annotations

from typing import Any

from ...layers import ACTIVATIONS
from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..family import Family
from ..hf_config import flag, one_of, positive_float, positive_int, whole_heads
from ..rope import rope_fields, rope_max_positions
from ..spec import DecoderSpec

__all__ = ["FAMILIES", "gpt_neox_spec"]


def gpt_neox_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GPTNeoXConfig`: side by side or in turn, both sublayers have a norm of their own."""
    bias = flag(config, "attention_bias", True)
    heads = whole_heads(config)
    return DecoderSpec(
        vocab_size=positive_int(config, "vocab_size"),
        intermediate_size=positive_int(config, "intermediate_size"),
        num_layers=positive_int(config, "num_hidden_layers"),
        **heads,
        num_kv_heads=heads["num_heads"],
        max_position_embeddings=rope_max_positions(config),
        windows=(0,) * config.num_hidden_layers,
        embedding_size=config.hidden_size,
        tie_word_embeddings=flag(config, "tie_word_embeddings", False),
        rms_norm=False,
        norm_eps=positive_float(config, "layer_norm_eps", most=1.0),
        parallel=flag(config, "use_parallel_residual", True),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=True,
        gated_mlp=False,
        activation=one_of(config, "hidden_act", tuple(ACTIVATIONS)),
        **rope_fields(config, partial=True),
    )


def _weights(spec: DecoderSpec) -> WeightMap:
    return WeightMap(
        prefixes=("gpt_neox.",),
        modules={
            "embed_in": "embed_tokens",
            "layers.*.input_layernorm": "layers.*.attention_norm",
            "layers.*.attention": "layers.*.attention.kv_scales",
            "layers.*.attention.query_key_value": "layers.*.attention.qkv",
            "layers.*.attention.dense": "layers.*.attention.out",
            "layers.*.post_attention_layernorm": "layers.*.mlp_norm",
            "layers.*.mlp.dense_h_to_4h": "layers.*.mlp.up",
            "layers.*.mlp.dense_4h_to_h": "layers.*.mlp.down",
            "final_layer_norm": "norm",
            "embed_out": "lm_head",
            "lm_head": "lm_head",
            "score": "score",
        },
        # The causal mask, the score of a masked key, and rotary frequencies.
        ignored=("layers.*.attention.bias", "layers.*.attention.masked_bias", "layers.*.attention.rotary_emb"),
        layouts={"layers.*.attention.query_key_value": TensorLayout(("query", "key", "value"), spec.num_heads)},
    )


FAMILIES = (Family(("GPTNeoXForCausalLM",), gpt_neox_spec, _weights),)
