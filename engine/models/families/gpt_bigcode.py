"""The family of GPT-BigCode: SantaCoder (arXiv:2301.03988) and StarCoder (arXiv:2305.06161): `gpt_bigcode_spec`."""

from __future__ import annotations

from typing import Any

from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..family import Family
from ..hf_config import flag
from ..spec import AttentionSpec, DecoderSpec
from .gpt2 import MODULES, gpt2_fields

__all__ = ["FAMILIES", "gpt_bigcode_spec"]


def gpt_bigcode_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GPTBigCodeConfig`: GPT-2 with one KV head. Its softmax is in float32, as ours is."""
    fields = gpt2_fields(config)
    num_kv_heads = 1 if flag(config, "multi_query", True) else fields["num_heads"]
    scale = None if flag(config, "scale_attn_weights", True) else 1.0
    return DecoderSpec(**fields, num_kv_heads=num_kv_heads, attention=AttentionSpec(scale=scale))


def _weights(spec: DecoderSpec) -> WeightMap:
    layouts = {"h.*.attn.c_attn": TensorLayout(("query", "key", "value"), spec.num_kv_heads)}
    ignored = ("h.*.attn.bias", "h.*.attn.masked_bias")
    return WeightMap(prefixes=("transformer.",), modules=MODULES, ignored=ignored, layouts=layouts)


FAMILIES = (Family(("GPTBigCodeForCausalLM",), gpt_bigcode_spec, _weights),)
