"""The family of OPT (Zhang et al., 2022, arXiv:2205.01068), all sizes: `opt_spec`."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from ...layers import ACTIVATIONS
from ...weights.checkpoint import WeightMap
from ..family import Family
from ..hf_config import flag, one_of, positive_int
from ..spec import DecoderSpec

__all__ = ["FAMILIES", "WEIGHTS", "opt_spec"]

WEIGHTS = WeightMap(
    prefixes=("model.decoder.", "decoder."),
    modules={
        "embed_tokens": "embed_tokens",
        "embed_positions": "positions",
        "project_in": "project_in",
        "layers.*.self_attn_layer_norm": "layers.*.attention_norm",
        "layers.*.self_attn": "layers.*.attention.kv_scales",
        "layers.*.self_attn.q_proj": "layers.*.attention.qkv.query",
        "layers.*.self_attn.k_proj": "layers.*.attention.qkv.key",
        "layers.*.self_attn.v_proj": "layers.*.attention.qkv.value",
        "layers.*.self_attn.out_proj": "layers.*.attention.out",
        "layers.*.final_layer_norm": "layers.*.mlp_norm",
        "layers.*.fc1": "layers.*.mlp.up",
        "layers.*.fc2": "layers.*.mlp.down",
        "final_layer_norm": "norm",
        "project_out": "project_out",
        "lm_head": "lm_head",
        "score": "score",
    },
)


def opt_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `OPTConfig`: learned positions, norms before sublayers (in the 350m model after them)."""
    hidden_size, num_heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    if hidden_size % num_heads:
        raise UnsupportedModelError(
            f"config field 'num_attention_heads' is {num_heads}; it must divide hidden_size={hidden_size}"
        )
    norm_before, bias = flag(config, "do_layer_norm_before", True), flag(config, "enable_bias", True)
    num_layers = positive_int(config, "num_hidden_layers")
    return DecoderSpec(
        vocab_size=positive_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=positive_int(config, "ffn_dim"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=positive_int(config, "max_position_embeddings"),
        windows=(0,) * num_layers,
        embedding_size=positive_int(config, "word_embed_proj_dim"),
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
        rms_norm=False,
        norm_eps=1e-5,
        norm_affine=flag(config, "layer_norm_elementwise_affine", True),
        norm_placement="before" if norm_before else "after",
        final_norm=norm_before and not flag(config, "_remove_final_layer_norm", False),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        gated_mlp=False,
        activation=one_of(config, "activation_function", tuple(ACTIVATIONS)),
        position_offset=2,
    )


FAMILIES = (Family(("OPTForCausalLM",), opt_spec, WEIGHTS),)
