"""The family of Phi 1, 1.5 and 2 (Gunasekar et al., 2023, arXiv:2306.11644): `phi_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError
from ...layers import ACTIVATIONS
from ..family import Family
from ..hf_config import flag, one_of, positive_float
from ..spec import DecoderSpec
from .llama import WEIGHTS as LLAMA_WEIGHTS
from .llama import rotary_fields

__all__ = ["FAMILIES", "check_untied", "phi_spec"]

WEIGHTS = replace(
    LLAMA_WEIGHTS,
    modules={
        **LLAMA_WEIGHTS.modules,
        "layers.*.self_attn.q_layernorm": "layers.*.attention.rotate_and_store.q_norm",
        "layers.*.self_attn.k_layernorm": "layers.*.attention.rotate_and_store.k_norm",
        "layers.*.self_attn.dense": "layers.*.attention.out",
        "layers.*.mlp.fc1": "layers.*.mlp.up",
        "layers.*.mlp.fc2": "layers.*.mlp.down",
        "final_layernorm": "norm",
    },
)


def check_untied(config: Any) -> None:
    """Raises `UnsupportedModelError` if the head, which has a bias, is tied to the embedding."""
    if flag(config, "tie_word_embeddings", False):
        raise UnsupportedModelError("config field 'tie_word_embeddings' is true; heads with a bias cannot be tied")


def phi_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `PhiConfig`: one norm for both sublayers of a layer, and biases, the head's among them."""
    check_untied(config)
    return DecoderSpec(
        **rotary_fields(config, partial=True),
        windows=(0,) * config.num_hidden_layers,
        rms_norm=False,
        norm_eps=positive_float(config, "layer_norm_eps", most=1.0),
        parallel=True,
        shared_norm=True,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        head_bias=True,
        qk_norm=flag(config, "qk_layernorm", False),
        qk_norm_form="layer",
        gated_mlp=False,
        activation=one_of(config, "hidden_act", tuple(ACTIVATIONS)),
    )


FAMILIES = (Family(("PhiForCausalLM",), phi_spec, WEIGHTS),)
