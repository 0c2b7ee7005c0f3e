"""The families of Qwen 2, 2.5 and 3, without experts: `qwen2_spec`, `qwen3_spec`."""

from __future__ import annotations

from typing import Any

from ..family import Family
from ..hf_config import attention_windows, flag
from ..spec import DecoderSpec
from .llama import WEIGHTS, gated_fields

__all__ = ["FAMILIES", "qwen2_spec", "qwen3_spec"]


def qwen2_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Qwen2Config`: query, key and value projections have biases, the output projection not."""
    return DecoderSpec(**gated_fields(config), windows=attention_windows(config), qkv_bias=True)


def qwen3_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `Qwen3Config`: each query and key head is normed before the rotation."""
    attention_bias = flag(config, "attention_bias", False)
    return DecoderSpec(
        **gated_fields(config),
        windows=attention_windows(config),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        qk_norm=True,
    )


FAMILIES = (
    Family(("Qwen2ForCausalLM",), qwen2_spec, WEIGHTS),
    Family(("Qwen3ForCausalLM",), qwen3_spec, WEIGHTS),
)
