"""The families of GPT-J (Wang and Komatsuzaki, 2021) and CodeGen (Nijkamp et al., 2022, arXiv:2203.13474)."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..family import Family
from ..hf_config import positive_int
from ..rope import plain_rope
from ..spec import DecoderSpec
from .gpt2 import MODULES, gpt2_fields
from .phi import check_untied

__all__ = ["FAMILIES", "codegen_spec", "gptj_spec"]

_MODULES = {
    **{name: ours for name, ours in MODULES.items() if ".c_" not in name},
    "h.*.attn.out_proj": "layers.*.attention.out",
    "h.*.mlp.fc_in": "layers.*.mlp.up",
    "h.*.mlp.fc_out": "layers.*.mlp.down",
}
_QKV = {f"h.*.attn.{name[0]}_proj": f"layers.*.attention.qkv.{name}" for name in ("query", "key", "value")}

CODEGEN_GROUPS = 4
"""CodeGen's checkpoints have the rows of query, value and key of four ranks, one rank's after the other's."""

WEIGHTS = WeightMap(
    prefixes=("transformer.",),
    modules={**_MODULES, **_QKV},
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),  # the causal mask, and the score of a masked key
)
CODEGEN_WEIGHTS = WeightMap(
    prefixes=("transformer.",),
    modules={**_MODULES, "h.*.attn.qkv_proj": "layers.*.attention.qkv"},
    ignored=("h.*.attn.causal_mask",),
    layouts={"h.*.attn.qkv_proj": TensorLayout(("query", "value", "key"), CODEGEN_GROUPS)},
)


def gptj_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `GPTJConfig`: one norm for both sublayers of a layer, and neighbours that are rotated."""
    check_untied(config)
    fields, rot_dim = gpt2_fields(config), positive_int(config, "rotary_dim")
    if rot_dim % 2 or rot_dim > fields["head_dim"]:
        raise UnsupportedModelError(
            f"config field 'rotary_dim' is {rot_dim}; it must be even, and at most the size of a head, "
            f"{fields['head_dim']}"
        )
    own = {"qkv_bias": False, "attention_out_bias": False, "head_bias": True, "position_offset": None}
    return DecoderSpec(
        **{**fields, **own},
        num_kv_heads=fields["num_heads"],
        parallel=True,
        shared_norm=True,
        rope=plain_rope(rot_dim, 10_000.0, interleaved=True),
    )


def codegen_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `CodeGenConfig`: GPT-J, whose checkpoints have another layout."""
    spec = gptj_spec(config)
    if spec.num_heads % CODEGEN_GROUPS:
        raise UnsupportedModelError(
            f"config field 'n_head' is {spec.num_heads}; it must be a multiple of {CODEGEN_GROUPS}, in which the "
            "checkpoint divides them"
        )
    return spec


FAMILIES = (
    Family(("GPTJForCausalLM",), gptj_spec, WEIGHTS),
    Family(("CodeGenForCausalLM",), codegen_spec, CODEGEN_WEIGHTS),
)
