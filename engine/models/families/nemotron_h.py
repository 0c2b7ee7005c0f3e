"""The family of Nemotron-H (NVIDIA, 2025, arXiv:2504.03624) and Nemotron 3: `nemotron_h_spec`.

Each layer is one sublayer: a Mamba-2 layer, attention without positions, a feed-forward network, or experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import ACTIVATIONS
from ...weights.checkpoint import WeightMap
from ...weights.tensor_layout import TensorLayout
from ..expert_fields import corrected_router
from ..family import Family
from ..hf_config import flag, head_counts, one_of, positive_float, positive_int
from ..spec import DecoderSpec, ExpertsSpec
from ..state_fields import MAMBA_FIELDS, mamba_state
from .bamba import MAMBA_LAYOUTS, MAMBA_MODULES

__all__ = ["FAMILIES", "WEIGHTS", "nemotron_h_spec"]

WEIGHTS = WeightMap(
    prefixes=("backbone.", "model."),
    modules={
        "embeddings": "embed_tokens",
        "layers.*.norm": "layers.*.norm",
        **{name.replace(".mamba", ".mixer"): ours for name, ours in MAMBA_MODULES.items()},
        "layers.*.mixer.q_proj": "layers.*.attention.qkv.query",
        "layers.*.mixer.k_proj": "layers.*.attention.qkv.key",
        "layers.*.mixer.v_proj": "layers.*.attention.qkv.value",
        "layers.*.mixer.o_proj": "layers.*.attention.out",
        "layers.*.mixer.up_proj": "layers.*.mlp.up",
        "layers.*.mixer.down_proj": "layers.*.mlp.down",
        "layers.*.mixer.gate": "layers.*.mlp.router.linear",
        "layers.*.mixer.experts.*.up_proj": "layers.*.mlp.experts.*.up",
        "layers.*.mixer.experts.*.down_proj": "layers.*.mlp.experts.*.down",
        "layers.*.mixer.shared_experts.up_proj": "layers.*.mlp.shared.up",
        "layers.*.mixer.shared_experts.down_proj": "layers.*.mlp.shared.down",
        "norm_f": "norm",
        "lm_head": "lm_head",
        "score": "score",
    },
    tensors={
        "layers.*.mixer.experts.up_proj": "layers.*.mlp.experts.*.up.weight",
        "layers.*.mixer.experts.down_proj": "layers.*.mlp.experts.*.down.weight",
        "layers.*.mixer.gate.e_score_correction_bias": "layers.*.mlp.router.correction",
    },
    layouts={
        **{name.replace(".mamba", ".mixer"): layout for name, layout in MAMBA_LAYOUTS.items()},
        "layers.*.mixer.experts.up_proj": TensorLayout(stacked=True),
        "layers.*.mixer.experts.down_proj": TensorLayout(stacked=True),
    },
    ignored_starts=("mtp.",),  # Layers that predict further tokens.
)

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "linear_attention": "state",
        "mamba": "state",
        "full_attention": "attention",
        "attention": "attention",
        "mlp": "dense",
        "moe": "experts",
    }
)
"""Kinds of layers in configs -> what the layer is."""

MAMBA_NAMES = MappingProxyType(
    {
        **MAMBA_FIELDS,
        "num_heads": "mamba_num_heads",
        "head_dim": "mamba_head_dim",
        "num_groups": "n_groups",
        "state_size": "ssm_state_size",
        "conv_width": "conv_kernel",
        "conv_bias": "use_conv_bias",
        "bias": "use_bias",
        "activation": "mamba_hidden_act",
    }
)
"""Names of the fields of Mamba-2 layers in the config."""

ABSENT = (
    "attention_bias",
    "mamba_proj_bias",
    "moe_latent_size",
    "residual_in_fp32",
    "sliding_window",
    "tie_word_embeddings",
)
"""Fields that must be false or null: what they ask for is not implemented, or transformers does not read them."""


def nemotron_h_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `NemotronHConfig`.

    Step sizes are limited by `time_step_limit` alone. `time_step_min` is for the first values of weights, although
    transformers takes it for the least step size of prompts, and of no other tokens.
    """
    for field in ABSENT:
        value = getattr(config, field, None)
        if value is not None and value is not False:
            raise UnsupportedModelError(
                f"config field {field!r} is {quote(value)}; for this architecture it can only be false or null"
            )
    layers, activation = _layers(config), one_of(config, "mlp_hidden_act", tuple(ACTIVATIONS))
    experts = layers["experts"]
    return DecoderSpec(
        vocab_size=positive_int(config, "vocab_size"),
        hidden_size=positive_int(config, "hidden_size"),
        intermediate_size=positive_int(config, "intermediate_size"),
        num_layers=len(config.layers_block_type),
        **head_counts(config),
        max_position_embeddings=positive_int(config, "max_position_embeddings"),
        windows=(0,) * len(config.layers_block_type),
        embedding_size=config.hidden_size,
        tie_word_embeddings=False,
        rms_norm=True,
        norm_eps=positive_float(config, "layer_norm_epsilon", most=1.0),
        mlp_bias=flag(config, "mlp_bias", False),
        gated_mlp=False,
        activation=activation,
        mlp_layers=experts | layers["dense"],
        experts=_experts(config, experts) if experts else None,
        state=mamba_state(config, layers["state"], MAMBA_NAMES),
    )


def _layers(config: Any) -> dict[str, frozenset[int]]:
    """Returns the numbers of the layers of each kind: a value of `KINDS`."""
    kinds = config.layers_block_type
    if not isinstance(kinds, list | tuple) or not all(isinstance(kind, str) and kind in KINDS for kind in kinds):
        raise UnsupportedModelError(
            f"config field 'layers_block_type' is {quote(kinds)}; each layer can be one of {', '.join(KINDS)}"
        )
    found = {ours: frozenset(i for i, kind in enumerate(kinds) if KINDS[kind] == ours) for ours in KINDS.values()}
    if not found["attention"]:
        raise UnsupportedModelError(
            f"config field 'layers_block_type' is {quote(kinds)}; at least one layer must have attention"
        )
    return found


def _experts(config: Any, layers: frozenset[int]) -> ExpertsSpec:
    one_of(config, "mlp_hidden_act", ("relu2",))
    if config.n_shared_experts != 1:
        raise UnsupportedModelError(
            f"config field 'n_shared_experts' is {quote(config.n_shared_experts)}; only 1 is implemented"
        )
    return ExpertsSpec(
        layers=layers,
        router=corrected_router(config),
        intermediate_size=positive_int(config, "moe_intermediate_size"),
        gate="relu_squared",
        shared_size=positive_int(config, "moe_shared_expert_intermediate_size"),
    )


FAMILIES = (Family(("NemotronHForCausalLM",), nemotron_h_spec, WEIGHTS),)
