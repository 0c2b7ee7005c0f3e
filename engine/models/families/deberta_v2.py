"""The family of DeBERTa-v2 and -v3 (He et al., 2020, arXiv:2006.03654; 2021, arXiv:2111.09543)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError, quote
from ...layers import HEAD_ACTIVATIONS, DistanceTerms
from ...weights.checkpoint import WeightMap
from ..family import CLASSIFIER, TOKEN_CLASSIFIER, Family
from ..hf_config import flag, one_of, positive_int
from ..spec import AttentionSpec, ConvSpec, DecoderSpec, DistanceSpec, HeadSpec
from .bert import BLOCK, EMBEDDINGS, POOLED, encoder_fields, encoder_weights

__all__ = ["FAMILIES", "deberta_v2_spec"]

_SELF = "encoder.layer.*.attention.self"

MODULES = {
    **EMBEDDINGS,
    **{their: our for their, our in BLOCK.items() if not their.startswith(_SELF)},
    f"{_SELF}.query_proj": "layers.*.attention.qkv.query",
    f"{_SELF}.key_proj": "layers.*.attention.qkv.key",
    f"{_SELF}.value_proj": "layers.*.attention.qkv.value",
    "encoder.rel_embeddings": "distance_vectors",
    "encoder.LayerNorm": "distance_vectors.norm",
    "encoder.conv.conv": "layers.0.conv",
    "encoder.conv.LayerNorm": "layers.0.conv_norm",
}
"""Names of the modules in checkpoints -> ours."""

TERMS: DistanceTerms = frozenset({"c2p", "p2c"})
"""The terms of scores by distance that a config may name."""

_whole_weights = encoder_weights(
    "deberta.", modules=MODULES, head=POOLED, training_heads=("cls.", "lm_predictions.", "mask_predictions.")
)


def deberta_v2_spec(config: Any) -> DecoderSpec:
    """Returns the spec of a `DebertaV2Config`: as BERT, with vectors of distances beside positions or without."""
    fields, distances, num_types = encoder_fields(config), _distances(config), getattr(config, "type_vocab_size", 0)
    _check_sizes(config, fields["hidden_size"], fields["head_dim"])
    scale = (fields["head_dim"] * (1 + len(distances.terms))) ** -0.5
    attention = AttentionSpec(causal=False, scale=scale, distances=distances)
    return DecoderSpec(
        **{**fields, "attention": attention},
        position_offset=0 if flag(config, "position_biased_input", True) else None,
        first_conv=_first_conv(config, fields["hidden_size"]),
        num_token_types=0 if num_types == 0 else positive_int(config, "type_vocab_size"),
    )


def _check_sizes(config: Any, hidden_size: int, head_dim: int) -> None:
    """Raises if a size that configs may have differs from the value that all models of the family have."""
    done = {"embedding_size": hidden_size, "attention_head_size": head_dim, "pooler_hidden_size": hidden_size}
    for field, size in done.items():
        if (value := getattr(config, field, size)) != size:
            raise UnsupportedModelError(f"config field {field!r} is {quote(value)}; only {size} is done for this model")


def _first_conv(config: Any, hidden_size: int) -> ConvSpec | None:
    if getattr(config, "conv_kernel_size", 0) == 0:
        return None
    width = positive_int(config, "conv_kernel_size")
    groups = positive_int(config, "conv_groups") if hasattr(config, "conv_groups") else 1
    if width % 2 == 0 or hidden_size % groups:
        raise UnsupportedModelError(
            f"config fields 'conv_kernel_size' and 'conv_groups' are {width} and {groups}; the first must be odd, and "
            f"the second divide hidden_size={hidden_size}"
        )
    activation = one_of(config, "conv_act", tuple(HEAD_ACTIVATIONS)) if hasattr(config, "conv_act") else "tanh"
    return ConvSpec(width, groups, activation)


def _distances(config: Any) -> DistanceSpec:
    for field in ("relative_attention", "share_att_key"):
        if not flag(config, field, False):
            raise UnsupportedModelError(f"config field {field!r} is false; it is done for true only")
    max_distance, num_buckets = getattr(config, "max_relative_positions", -1), None
    if max_distance == -1:
        max_distance = positive_int(config, "max_position_embeddings")
    elif type(max_distance) is not int or max_distance < 1:
        raise UnsupportedModelError(
            f"config field 'max_relative_positions' is {quote(max_distance)}; it must be a positive integer, or -1"
        )
    if getattr(config, "position_buckets", -1) != -1:
        num_buckets = positive_int(config, "position_buckets")
        if num_buckets % 2 or num_buckets // 2 >= max_distance - 1:
            raise UnsupportedModelError(
                f"config field 'position_buckets' is {num_buckets}; it must be even, and less than twice "
                f"{max_distance - 1}, the largest distance but one"
            )
    norms = [name.strip() for name in str(getattr(config, "norm_rel_ebd", "none")).lower().split("|")]
    if not {*norms} <= {"none", "layer_norm"}:
        raise UnsupportedModelError(
            f"config field 'norm_rel_ebd' is {quote(config.norm_rel_ebd)}; it must be 'none' or 'layer_norm'"
        )
    return DistanceSpec(max_distance, num_buckets, _terms(config), norm="layer_norm" in norms)


def _terms(config: Any) -> DistanceTerms:
    value = getattr(config, "pos_att_type", None)
    terms = frozenset(value) if isinstance(value, list) and all(isinstance(term, str) for term in value) else ()
    if not terms or not terms <= TERMS:
        raise UnsupportedModelError(
            f"config field 'pos_att_type' is {quote(value)}; it must be a list of {' and '.join(sorted(TERMS))}, or one"
        )
    return terms


def _classifier(config: Any) -> HeadSpec:
    return HeadSpec("CLS", one_of(config, "pooler_hidden_act", tuple(HEAD_ACTIVATIONS)), bias=True)


def _weights(spec: DecoderSpec) -> WeightMap:
    """Returns the map of the weights. Checkpoints may have a table of positions that the model does not use."""
    weights = _whole_weights(spec)
    if spec.position_offset is not None:
        return weights
    return replace(weights, ignored=(*weights.ignored, "embeddings.position_embeddings"))


FAMILIES = (
    Family(
        ("DebertaV2Model",),
        deberta_v2_spec,
        _weights,
        heads={CLASSIFIER: _classifier, TOKEN_CLASSIFIER: HeadSpec(bias=True)},
    ),
)
