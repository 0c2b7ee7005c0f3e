"""The family of StarCoder 2 (Lozhkov et al., 2024, arXiv:2402.19173): `starcoder2_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import ACTIVATIONS
from ..family import Family
from ..hf_config import attention_windows, flag, head_counts, one_of, positive_float, positive_int
from ..rope import rope_max_positions, rope_spec
from ..spec import DecoderSpec
from .llama import WEIGHTS as LLAMA_WEIGHTS

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
    heads: dict[str, Any] = {**head_counts(config)}
    return DecoderSpec(
        vocab_size=positive_int(config, "vocab_size"),
        hidden_size=positive_int(config, "hidden_size"),
        intermediate_size=positive_int(config, "intermediate_size"),
        num_layers=positive_int(config, "num_hidden_layers"),
        **heads,
        max_position_embeddings=rope_max_positions(config),
        windows=attention_windows(config),
        embedding_size=config.hidden_size,
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
        rms_norm=False,
        norm_eps=positive_float(config, "norm_epsilon", most=1.0),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        gated_mlp=False,
        activation=one_of(config, "hidden_act", tuple(ACTIVATIONS)),
        rope=rope_spec(config),
    )


FAMILIES = (Family(("Starcoder2ForCausalLM",), starcoder2_spec, WEIGHTS),)
