"""The family of EXAONE 4 without experts (LG AI Research, 2025, arXiv:2507.11407): `exaone4_spec`."""

from __future__ import annotations

from typing import Any

from ..family import Family
from ..hf_config import attention_windows
from ..spec import DecoderSpec, RopeSpec
from .llama import gated_fields
from .olmo import OLMO2_WEIGHTS

__all__ = ["FAMILIES", "exaone4_spec"]


def exaone4_spec(config: Any) -> DecoderSpec:
    """Returns the spec of an `Exaone4Config`: norms after sublayers and of heads; some layers have no positions.

    These are the layers without a window, in models in which others have one.
    """
    fields, windows = gated_fields(config), attention_windows(config)
    if getattr(config, "sliding_window", None) is not None and "rope" in fields:
        rope, nothing = fields.pop("rope"), RopeSpec(inv_freq=())
        fields["layer_ropes"] = tuple(rope if window else nothing for window in windows)
    return DecoderSpec(**fields, windows=windows, norm_placement="output", qk_norm=True)


FAMILIES = (Family(("Exaone4ForCausalLM",), exaone4_spec, OLMO2_WEIGHTS),)
