"""The family of Nemotron 4 and Minitron (Parmar et al., 2024, arXiv:2402.16819): `nemotron_spec`."""

from __future__ import annotations

from typing import Any

from ...layers import ACTIVATIONS
from ..family import Family
from ..hf_config import flag, one_of, positive_float
from ..spec import DecoderSpec
from .llama import rotary_fields
from .llama_like import PLAIN_WEIGHTS

__all__ = ["FAMILIES", "nemotron_spec"]


def nemotron_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `NemotronConfig`: layer norms by `1 + weight`, no gates, partial rotation."""
    bias = flag(config, "attention_bias", False)
    return DecoderSpec(
        **rotary_fields(config, partial=True),
        windows=(0,) * config.num_hidden_layers,
        rms_norm=False,
        norm_eps=positive_float(config, "norm_eps", most=1.0),
        norm_unit_offset=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=flag(config, "mlp_bias", False),
        gated_mlp=False,
        activation=one_of(config, "hidden_act", tuple(ACTIVATIONS)),
    )


FAMILIES = (Family(("NemotronForCausalLM",), nemotron_spec, PLAIN_WEIGHTS),)
