"""The family of GPT-2 (Radford et al., 2019) and DistilGPT2: `gpt2_spec`."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from ...layers import ACTIVATIONS
from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..family import Family
from ..hf_config import flag, one_of, positive_float, positive_int
from ..spec import AttentionSpec, DecoderSpec

__all__ = ["FAMILIES", "MODULES", "gpt2_fields", "gpt2_spec"]

MODULES = {
    "wte": "embed_tokens",
    "wpe": "positions",
    "h.*.ln_1": "layers.*.attention_norm",
    "h.*.attn.c_attn": "layers.*.attention.qkv",
    "h.*.attn.c_proj": "layers.*.attention.out",
    "h.*.ln_2": "layers.*.mlp_norm",
    "h.*.mlp.c_fc": "layers.*.mlp.up",
    "h.*.mlp.c_proj": "layers.*.mlp.down",
    "ln_f": "norm",
    "lm_head": "lm_head",
    "score": "score",
}

WEIGHTS = WeightMap(
    prefixes=("transformer.",),
    modules=MODULES,
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),  # the causal mask, and the score of a masked key
    layouts={
        "h.*.attn.c_attn": TensorLayout(("query", "key", "value"), transposed=True),
        "h.*.attn.c_proj": TensorLayout(transposed=True),
        "h.*.mlp.c_fc": TensorLayout(transposed=True),
        "h.*.mlp.c_proj": TensorLayout(transposed=True),
    },
)


def gpt2_fields(config: Any) -> dict[str, Any]:
    """Returns the `DecoderSpec` fields of GPT-2 and its successors: learned positions, layer norms, biases."""
    hidden_size, num_heads = positive_int(config, "n_embd"), positive_int(config, "n_head")
    if hidden_size % num_heads:
        raise UnsupportedModelError(f"config field 'n_head' is {num_heads}; it must divide n_embd={hidden_size}")
    if flag(config, "add_cross_attention", False):
        raise UnsupportedModelError("config field 'add_cross_attention' is true; models without an encoder are run")
    num_layers = positive_int(config, "n_layer")
    return {
        "vocab_size": positive_int(config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size if config.n_inner is None else positive_int(config, "n_inner"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": positive_int(config, "n_positions"),
        "windows": (0,) * num_layers,
        "embedding_size": hidden_size,
        "tie_word_embeddings": flag(config, "tie_word_embeddings", True),
        "rms_norm": False,
        "norm_eps": positive_float(config, "layer_norm_epsilon", most=1.0),
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
        "activation": one_of(config, "activation_function", tuple(ACTIVATIONS)),
        "position_offset": 0,
    }


def gpt2_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GPT2Config`. `reorder_and_upcast_attn` asks for scores in float32, as ours always are."""
    fields = gpt2_fields(config)
    scale = None if flag(config, "scale_attn_weights", True) else 1.0
    by_layer = flag(config, "scale_attn_by_inverse_layer_idx", False)
    return DecoderSpec(
        **fields, num_kv_heads=fields["num_heads"], attention=AttentionSpec(scale=scale, scaled_by_layer=by_layer)
    )


FAMILIES = (Family(("GPT2LMHeadModel",), gpt2_spec, WEIGHTS),)
