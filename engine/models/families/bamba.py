"""The family of Bamba (IBM, Princeton, CMU and UIUC, 2024): `bamba_spec`. Most layers are Mamba-2 layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...weights.tensor_layout import TensorLayout
from ..family import Family
from ..hf_config import flag
from ..spec import DecoderSpec
from ..state_fields import mamba_state, state_layers
from .llama import WEIGHTS as LLAMA_WEIGHTS
from .llama import gated_fields

__all__ = ["FAMILIES", "MAMBA_LAYOUTS", "MAMBA_MODULES", "WEIGHTS", "bamba_spec"]

MAMBA_MODULES = {
    "layers.*.mamba": "layers.*.attention",
    "layers.*.mamba.in_proj": "layers.*.attention.in_proj",
    "layers.*.mamba.conv1d": "layers.*.attention.conv",
    "layers.*.mamba.norm": "layers.*.attention.norm",
    "layers.*.mamba.out_proj": "layers.*.attention.out_proj",
}
"""Modules of a Mamba-2 layer in checkpoints -> our names."""

MAMBA_LAYOUTS = {
    "layers.*.mamba.in_proj": TensorLayout(("gate", "x", "b", "c", "dt")),
    "layers.*.mamba.conv1d": TensorLayout(("x", "b", "c")),
}

WEIGHTS = replace(
    LLAMA_WEIGHTS,
    modules={
        **LLAMA_WEIGHTS.modules,
        **MAMBA_MODULES,
        "layers.*.pre_ff_layernorm": "layers.*.mlp_norm",
        "layers.*.feed_forward.gate_proj": "layers.*.mlp.gate_up.gate",
        "layers.*.feed_forward.up_proj": "layers.*.mlp.gate_up.up",
        "layers.*.feed_forward.down_proj": "layers.*.mlp.down",
        "final_layernorm": "norm",
    },
    layouts=MAMBA_LAYOUTS,
)


def bamba_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `BambaConfig`: its attention layers rotate a part of each head."""
    attention_bias = flag(config, "attention_bias", False)
    return DecoderSpec(
        **gated_fields(config, partial=True),
        windows=(0,) * config.num_hidden_layers,
        state=mamba_state(config, state_layers(config, "layers_block_type")),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias", False),
    )


FAMILIES = (Family(("BambaForCausalLM",), bamba_spec, WEIGHTS),)
