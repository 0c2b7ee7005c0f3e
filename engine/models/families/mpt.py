"""The family of MPT (MosaicML, 2023): `mpt_spec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..alibi import alibi_slopes
from ..family import Family
from ..hf_config import flag, one_of, positive_float, positive_int, whole_heads
from ..spec import AttentionSpec, DecoderSpec

__all__ = ["FAMILIES", "WEIGHTS", "mpt_spec"]

WEIGHTS = WeightMap(
    prefixes=("transformer.",),
    modules={
        "wte": "embed_tokens",
        "blocks.*.norm_1": "layers.*.attention_norm",
        "blocks.*.attn.Wqkv": "layers.*.attention.qkv",
        "blocks.*.attn.out_proj": "layers.*.attention.out",
        "blocks.*.norm_2": "layers.*.mlp_norm",
        "blocks.*.ffn.up_proj": "layers.*.mlp.up",
        "blocks.*.ffn.down_proj": "layers.*.mlp.down",
        "norm_f": "norm",
        "lm_head": "lm_head",
        "score": "score",
    },
    layouts={"blocks.*.attn.Wqkv": TensorLayout(("query", "key", "value"))},
)

_WHOLE: Mapping[str, Any] = {"expansion_ratio": 4, "logit_scale": None, "no_bias": True}
_ATTENTION: Mapping[str, Any] = {
    "alibi": True,
    "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False,
    "prefix_lm": False,
    "qk_ln": False,
}
"""Fields of a config and its `attn_config` -> the only implemented value, with which transformers always computes."""


def mpt_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `MptConfig`: no biases, and scores that fall with distance."""
    attention = config.attn_config
    one_of(config, "norm_type", ("low_precision_layernorm", "layernorm"))
    for values, implemented in ((config, _WHOLE), (attention, _ATTENTION)):
        for field in implemented:
            _check(values, field, implemented[field])
    heads, num_layers = whole_heads(config), positive_int(config, "n_layers")
    max_bias = positive_int(attention, "alibi_bias_max")
    return DecoderSpec(
        vocab_size=positive_int(config, "vocab_size"),
        **heads,
        intermediate_size=4 * heads["hidden_size"],
        num_layers=num_layers,
        num_kv_heads=heads["num_heads"],
        max_position_embeddings=positive_int(config, "max_seq_len"),
        windows=(0,) * num_layers,
        attention=AttentionSpec(
            scale=None if attention.softmax_scale is None else positive_float(attention, "softmax_scale"),
            alibi_slopes=alibi_slopes(heads["num_heads"], max_bias),
        ),
        embedding_size=heads["hidden_size"],
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
        rms_norm=False,
        norm_eps=positive_float(config, "layer_norm_epsilon", most=1.0),
        norm_bias=False,
        qkv_limit=positive_float(attention, "clip_qkv") if attention.clip_qkv else 0.0,
        gated_mlp=False,
        activation="gelu",
    )


def _check(config: Any, field: str, implemented: Any) -> None:
    """Raises if a field has another value than the implemented one."""
    value = getattr(config, field, implemented)
    if value != implemented:
        raise UnsupportedModelError(
            f"config field {field!r} is {quote(value)}; it is implemented for {implemented} only"
        )


FAMILIES = (Family(("MptForCausalLM",), mpt_spec, WEIGHTS),)
