"""`ARCHITECTURES`: what llama.cpp changes in a checkpoint of each architecture, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UnsupportedModelError, quote
from .header import GgufHeader

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One value of `general.architecture`.

    Attributes:
        model_type: The `model_type` of its config.json.
        name: The architecture's name in its config.json.
        fields: Keys of its metadata, without the architecture, that other architectures lack -> fields of config.json.
        optional: The same for keys that a file may lack.
        paired_heads: The matrices whose rows hold each rotated pair of a head side by side, where a checkpoint has the
            first halves of the pairs before the second ones -> the key with their number of heads.
        norm_unit_offset: Whether the weights of norms are stored with 1 added.
        window_theta: Base of the rotary positions of layers with a window if the file does not say; 0 if all layers
            have the same base.
        num_largest_layers: Number of layers of its largest model, in which the scale of queries is of another size than
            a head; 0 if no field of config.json has that scale.
        strips_after: Whether white space after a special token of a vocabulary with scores has no tokens, unless the
            special token is one of the `WHOLE_TEXT` tokens.
        merges_by_id: Whether the merges of a vocabulary with scores go by the ids of the tokens, not by the scores.
    """

    model_type: str
    name: str
    fields: Mapping[str, str] = field(default_factory=lambda: {RMS_EPS: "rms_norm_eps"})
    optional: Mapping[str, str] = field(default_factory=dict)
    paired_heads: Mapping[str, str] = field(default_factory=dict)
    norm_unit_offset: bool = False
    window_theta: float = 0.0
    num_largest_layers: int = 0
    strips_after: bool = False
    merges_by_id: bool = False


RMS_EPS = "attention.layer_norm_rms_epsilon"
_PAIRED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_TOKEN_SOFTCAP = {"final_logit_softcapping": "final_logit_softcapping"}
_GEMMA2_FIELDS = {
    RMS_EPS: "rms_norm_eps",
    **_WINDOW,
    **_TOKEN_SOFTCAP,
    "attn_logit_softcapping": "attn_logit_softcapping",
}
_GRANITE_FIELDS = {
    RMS_EPS: "rms_norm_eps",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}

ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", paired_heads=_PAIRED),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", paired_heads=_PAIRED),
    "granite": Architecture("granite", "GraniteForCausalLM", _GRANITE_FIELDS, paired_heads=_PAIRED),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM"),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", optional=_WINDOW, strips_after=True),
    "gemma": Architecture("gemma", "GemmaForCausalLM", norm_unit_offset=True, merges_by_id=True),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        _GEMMA2_FIELDS,
        norm_unit_offset=True,
        num_largest_layers=46,
        merges_by_id=True,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {RMS_EPS: "rms_norm_eps", **_WINDOW},
        _TOKEN_SOFTCAP,
        norm_unit_offset=True,
        window_theta=10000.0,
        num_largest_layers=62,
        merges_by_id=True,
    ),
    "starcoder2": Architecture("starcoder2", "Starcoder2ForCausalLM", {"attention.layer_norm_epsilon": "norm_epsilon"}),
}
"""Value of `general.architecture` -> the architecture. Models of Mistral are stored as llama."""


def find_architecture(header: GgufHeader) -> Architecture:
    """Returns the architecture of a file.

    Raises:
        UnsupportedModelError: The architecture is not implemented.
    """
    name = header.architecture
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{header.file}: general.architecture is {quote(name)}; of GGUF files these are implemented: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]
