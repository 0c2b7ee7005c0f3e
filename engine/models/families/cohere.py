"""The families of Command-R, Command-A and Aya (Cohere, 2024 and 2025): `cohere_spec`, `cohere2_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...layers import GATES
from ...weights.tensor_layout import TensorLayout
from ..family import Family
from ..hf_config import attention_windows, flag, one_of, positive_float
from ..spec import DecoderSpec
from .llama import WEIGHTS as LLAMA_WEIGHTS
from .llama import rotary_fields

__all__ = ["FAMILIES", "WEIGHTS", "cohere2_spec", "cohere_spec"]

_HEAD_NORMS = {
    f"layers.*.self_attn.{name}.weight": f"layers.*.attention.rotate_and_store.{name}.norms.*.weight"
    for name in ("q_norm", "k_norm")
}

WEIGHTS = replace(
    LLAMA_WEIGHTS, tensors=_HEAD_NORMS, layouts={name: TensorLayout(stacked=True) for name in _HEAD_NORMS}
)


def cohere_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `CohereConfig`: layer norms without biases, one of them for both sublayers of a layer."""
    bias = flag(config, "attention_bias", False)
    return DecoderSpec(
        **rotary_fields(config, tied=True, interleaved=True),
        windows=(0,) * config.num_hidden_layers,
        rms_norm=False,
        norm_eps=positive_float(config, "layer_norm_eps", most=1.0),
        norm_bias=False,
        parallel=True,
        shared_norm=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm=flag(config, "use_qk_norm", False),
        qk_norm_form="per head",
        gated_mlp=True,
        activation=one_of(config, "hidden_act", tuple(GATES)),
        logit_scale=positive_float(config, "logit_scale"),
    )


def cohere2_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Cohere2Config`: layers with a window have rotary positions, the others have none."""
    spec, windows = cohere_spec(config), attention_windows(config)
    return replace(
        spec, windows=windows, rope=None, layer_ropes=tuple(spec.rope if window else None for window in windows)
    )


FAMILIES = (
    Family(("CohereForCausalLM",), cohere_spec, WEIGHTS),
    Family(("Cohere2ForCausalLM",), cohere2_spec, WEIGHTS),
)
