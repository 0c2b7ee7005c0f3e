"""`rope_spec`: the rotary frequencies of a config. The scaled types are computed by functions of transformers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedModelError, quote
from .hf_config import MAX_INT, is_positive_number, positive_int
from .spec import RopeSpec

__all__ = ["plain_rope", "rope_fields", "rope_max_positions", "rope_spec"]

# "dynamic" changes its frequencies only when a sequence is longer than max_position_embeddings, and rope_max_positions
# allows no longer sequence.
_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

_NUMBERS = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "low_freq_factor",
    "high_freq_factor",
)
"""The numbers of the implemented rope types; a type has some of them."""

_LISTS = ("short_factor", "long_factor")
"""The lists of numbers, one for each pair, that the type longrope has."""


def rope_fields(config: Any, *, partial: bool = False, interleaved: bool = False) -> dict[str, Any]:
    """Returns the fields of `DecoderSpec` for rotary positions: `rope`, or `layer_ropes` if layers differ.

    Args:
        config: A transformers config. Its `rope_parameters` hold for all layers, or have an entry for each name in
            `layer_types`; the entry of a layer type without rotary positions is None.
        partial: As in `rope_spec`.
        interleaved: As in `rope_spec`.

    Raises:
        UnsupportedModelError: As in `rope_spec`; or the entries are not those that `layer_types` names.
    """
    if not _has_layer_types(config):
        return {"rope": rope_spec(config, partial=partial, interleaved=interleaved)}
    entries, kinds = config.rope_parameters, config.layer_types
    if not set(kinds) <= set(entries) or not all(isinstance(entry, Mapping | None) for entry in entries.values()):
        raise UnsupportedModelError(
            f"config field 'rope_parameters' is {quote(entries)}; with an entry for one layer type it must have one "
            f"for each of {', '.join(sorted(set(kinds)))}, and no numbers beside them"
        )
    present = {kind for kind in kinds if entries[kind] is not None}
    ropes = {kind: rope_spec(config, kind, partial=partial, interleaved=interleaved) for kind in present}
    return {"layer_ropes": tuple(ropes.get(kind) for kind in kinds)}


def rope_spec(
    config: Any, layer_type: str | None = None, *, partial: bool = False, interleaved: bool = False
) -> RopeSpec:
    """Computes the rotary frequencies that a config asks for.

    Args:
        config: A transformers config with `rope_parameters`.
        layer_type: Name of the entry of `rope_parameters` to read; None if they have no entries by layer type.
        partial: Whether models of this architecture can rotate a part of each head: `partial_rotary_factor`.
        interleaved: Whether neighbouring numbers of a head are rotated as a pair.

    Returns:
        Frequencies in float32 precision, and the factor on cosine and sine. The type longrope has two lists of
        frequencies.

    Raises:
        UnsupportedModelError: The rope type is not implemented, or its parameters are incomplete.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = _parameters(config, layer_type)
    rot_dim = _rot_dim(config, parameters, partial)
    num_short, long_inv_freq = 0, torch.empty(0)
    try:
        inv_freq, scaling = _default_inv_freq(rot_dim, parameters["rope_theta"]), 1.0
        if parameters["rope_type"] != "default":
            scale = functools.partial(ROPE_INIT_FUNCTIONS[parameters["rope_type"]], config, torch.device("cpu"))
            inv_freq, scaling = scale(layer_type=layer_type)
        if parameters["rope_type"] == "longrope":
            num_short = parameters["original_max_position_embeddings"]
            long_inv_freq, _ = scale(num_short + 1, layer_type=layer_type)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"config field 'rope_parameters' is {quote(parameters)}: {error!r:.200}") from error
    if not is_positive_number(scaling) or not torch.isfinite(torch.cat((inv_freq, long_inv_freq))).all():
        raise UnsupportedModelError(
            f"config field 'rope_parameters' is {quote(parameters)}; no finite frequencies follow from its numbers"
        )
    return RopeSpec(
        inv_freq=tuple(inv_freq.tolist()),
        scaling=float(scaling),
        long_inv_freq=tuple(long_inv_freq.tolist()),
        num_short_positions=num_short,
        interleaved=interleaved,
    )


def rope_max_positions(config: Any) -> int:
    """Returns the number of positions for which a config's rotary parameters are made.

    `linear` and `yarn` multiply the length with which the model was trained by their factor. That length is
    `original_max_position_embeddings` if the config has the field. In some configs `max_position_embeddings` is the
    length before the multiplication and in others the length after it, so the larger number is returned. In configs
    with rotary parameters by layer type it is always the length after it.

    Args:
        config: A transformers config with `rope_parameters`.
    """
    max_positions = positive_int(config, "max_position_embeddings")
    if _has_layer_types(config):
        return max_positions
    parameters = _parameters(config)
    if parameters["rope_type"] not in ("linear", "yarn"):
        return max_positions
    trained = parameters.get("original_max_position_embeddings") or max_positions
    scaled = trained * (parameters.get("factor") or 1.0)  # Without it, yarn scales up to `max_position_embeddings`.
    if not is_positive_number(scaled, MAX_INT):
        raise UnsupportedModelError(
            f"config field 'rope_parameters' is {quote(parameters)}: its positions are more than {MAX_INT}"
        )
    return max(max_positions, int(scaled))


def _has_layer_types(config: Any) -> bool:
    """Returns whether `rope_parameters` have an entry for a layer type of the config."""
    parameters, kinds = getattr(config, "rope_parameters", None), getattr(config, "layer_types", None)
    if not isinstance(parameters, Mapping) or not isinstance(kinds, list | tuple):
        return False
    return any(isinstance(kind, str) and kind in parameters for kind in kinds)


def _parameters(config: Any, layer_type: str | None = None) -> Mapping[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    if layer_type is not None:
        parameters = parameters[layer_type]
    rope_type = parameters.get("rope_type")
    if rope_type not in _TYPES:
        raise UnsupportedModelError(
            f"config field 'rope_parameters' is {quote(parameters)}; implemented rope types: {', '.join(_TYPES)}"
        )
    for name in ("rope_theta", *(name for name in _NUMBERS if parameters.get(name) is not None)):
        if not is_positive_number(parameters.get(name)):
            raise UnsupportedModelError(
                f"rope_parameters: {name!r} is {quote(parameters.get(name))}; it must be a positive, finite number"
            )
    for name in _LISTS if rope_type == "longrope" else ():
        numbers = parameters.get(name)
        if not isinstance(numbers, list) or not all(map(is_positive_number, numbers)):
            raise UnsupportedModelError(
                f"rope_parameters: {name!r} is {quote(numbers)}; it must be a list of positive, finite numbers"
            )
    return parameters


def _rot_dim(config: Any, parameters: Mapping[str, Any], partial: bool) -> int:
    """Returns how many numbers of each head are rotated."""
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factor = parameters.get("partial_rotary_factor", 1.0)
    if not partial and factor != 1.0:
        raise UnsupportedModelError(
            f"config field 'partial_rotary_factor' is {quote(factor)}; models of this architecture rotate whole heads "
            "(1.0)"
        )
    rot_dim = int(head_dim * factor) if is_positive_number(factor, 1.0) else 0
    if rot_dim < 2 or rot_dim % 2:
        raise UnsupportedModelError(
            f"config fields 'head_dim' and 'partial_rotary_factor' are {head_dim} and {quote(factor)}; their product "
            "is how many numbers of a head are rotated: an even number, and no more than the head has"
        )
    return rot_dim


def plain_rope(rot_dim: int, theta: float, *, interleaved: bool = False) -> RopeSpec:
    """Returns the rotary frequencies of a model whose config has no `rope_parameters`.

    Args:
        rot_dim: How many numbers of each head are rotated.
        theta: Base of the frequencies.
        interleaved: As in `rope_spec`.
    """
    return RopeSpec(tuple(_default_inv_freq(rot_dim, theta).tolist()), interleaved=interleaved)


def _default_inv_freq(rot_dim: int, theta: float) -> torch.Tensor:
    """Returns the frequencies theta^(-2i / rot_dim), i in 0 .. rot_dim / 2 - 1 (Su et al., 2021, section 3.2.2)."""
    exponents = torch.arange(0, rot_dim, 2, dtype=torch.float32) / rot_dim
    return 1.0 / theta**exponents
