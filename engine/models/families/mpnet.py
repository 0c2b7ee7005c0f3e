"""The family of MPNet (Song et al., 2020, arXiv:2004.09297): learned positions, and amounts by distance in scores."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from ..family import Family
from ..hf_config import positive_int
from ..spec import AttentionSpec, DecoderSpec, RelativeBiasSpec
from .bert import BLOCK, EMBEDDINGS, HEADS, after_padding, encoder_fields, encoder_weights

__all__ = ["FAMILIES", "mpnet_spec"]

PAD_TOKEN_ID = 1
"""The id of the padding token, after which positions begin, whatever the config says."""

BUCKETS = RelativeBiasSpec(num_buckets=32, max_distance=128)
"""The buckets of distances, which no field of a config changes: the number in configs is that of rows of the table."""

_ATTENTION = "encoder.layer.*.attention"

MODULES = {
    **{their: our for their, our in (EMBEDDINGS | BLOCK).items() if not their.startswith(_ATTENTION)},
    "encoder.relative_attention_bias": "relative_bias",
    f"{_ATTENTION}.attn.q": "layers.*.attention.qkv.query",
    f"{_ATTENTION}.attn.k": "layers.*.attention.qkv.key",
    f"{_ATTENTION}.attn.v": "layers.*.attention.qkv.value",
    f"{_ATTENTION}.attn.o": "layers.*.attention.out",
    f"{_ATTENTION}.LayerNorm": "layers.*.attention_norm",
}
"""Names of the modules in checkpoints -> ours."""


def mpnet_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `MPNetConfig`."""
    if (num_buckets := positive_int(config, "relative_attention_num_buckets")) != BUCKETS.num_buckets:
        raise UnsupportedModelError(
            f"config field 'relative_attention_num_buckets' is {num_buckets}; only {BUCKETS.num_buckets} is done"
        )
    fields = {**encoder_fields(config), "attention": AttentionSpec(causal=False, relative_bias=BUCKETS)}
    return after_padding(DecoderSpec(**fields), PAD_TOKEN_ID)


FAMILIES = (Family(("MPNetModel",), mpnet_spec, encoder_weights("mpnet.", modules=MODULES), heads=HEADS),)
