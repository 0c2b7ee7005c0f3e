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
        paired_heads: The matrices whose rows hold each rotated pair of a head side by side, where a checkpoint has the
            first halves of the pairs before the second ones -> the key with their number of heads.
        norm_unit_offset: Whether the weights of norms are stored with 1 added.
        merges_by_id: Whether the merges of a vocabulary with scores go by the ids of the tokens, not by the scores.
    """

    model_type: str
    name: str
    fields: Mapping[str, str] = field(default_factory=lambda: {RMS_EPS: "rms_norm_eps"})
    paired_heads: Mapping[str, str] = field(default_factory=dict)
    norm_unit_offset: bool = False
    merges_by_id: bool = False


RMS_EPS = "attention.layer_norm_rms_epsilon"
_GEMMA2_FIELDS = {
    RMS_EPS: "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        paired_heads={"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"},
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma": Architecture("gemma", "GemmaForCausalLM", norm_unit_offset=True, merges_by_id=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA2_FIELDS, norm_unit_offset=True, merges_by_id=True),
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
