"""Functions that read the config fields of layers with states: `mamba_state`, `delta_state`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from ..errors import UnsupportedModelError, quote
from .hf_config import flag, one_of, positive_int
from .spec import StateSpec

__all__ = ["MAMBA_FIELDS", "delta_state", "mamba_state", "state_layers"]

MAMBA_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "num_heads": "mamba_n_heads",
        "head_dim": "mamba_d_head",
        "num_groups": "mamba_n_groups",
        "state_size": "mamba_d_state",
        "conv_width": "mamba_d_conv",
        "conv_bias": "mamba_conv_bias",
        "bias": "mamba_proj_bias",
        "activation": "hidden_act",
    }
)
"""Names of the fields in the configs of Bamba and Granite."""

KINDS = {"linear_attention": True, "mamba": True, "full_attention": False, "attention": False}
"""Names of the kinds of layers in configs -> whether such a layer keeps states."""

MAX_CONV_WIDTH = 4
"""Largest width of a convolution that the kernels take."""


def state_layers(config: Any, field: str) -> frozenset[int]:
    """Returns the numbers of the layers that keep states.

    Args:
        config: A transformers config.
        field: Name of the field with the kind of each layer.

    Raises:
        UnsupportedModelError: A kind is unknown, their number is wrong, or no layer has attention.
    """
    kinds, num_layers = getattr(config, field, None), positive_int(config, "num_hidden_layers")
    is_known = isinstance(kinds, list | tuple) and all(isinstance(kind, str) and kind in KINDS for kind in kinds)
    if kinds is None or not is_known or len(kinds) != num_layers:
        raise UnsupportedModelError(
            f"config field {field!r} is {quote(kinds)}; it must say one of {', '.join(KINDS)} for each of the "
            f"{num_layers} layers"
        )
    found = frozenset(layer for layer, kind in enumerate(kinds) if KINDS[kind])
    if len(found) == num_layers:
        raise UnsupportedModelError(f"config field {field!r} is {quote(kinds)}; at least one layer must have attention")
    return found


def mamba_state(config: Any, layers: frozenset[int], names: Mapping[str, str] = MAMBA_FIELDS) -> StateSpec | None:
    """Returns the description of the layers of a model that are Mamba-2 layers; None if it has no such layer.

    Args:
        config: A transformers config.
        layers: Numbers of these layers.
        names: Fields of `StateSpec`, and `activation` -> names of the config's fields.

    Raises:
        UnsupportedModelError: A field is missing, or its value is not implemented.
    """
    limits = getattr(config, "time_step_limit", None)
    if limits is not None and tuple(limits) != (0.0, math.inf):
        raise UnsupportedModelError(
            f"config field 'time_step_limit' is {quote(limits)}; only (0, infinity) is implemented"
        )
    return _state(config, layers, names, "mamba2")


DELTA_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "num_heads": "linear_num_value_heads",
        "head_dim": "linear_value_head_dim",
        "num_groups": "linear_num_key_heads",
        "state_size": "linear_key_head_dim",
        "conv_width": "linear_conv_kernel_dim",
        "activation": "hidden_act",
    }
)
"""Names of the fields of gated delta networks."""


def delta_state(config: Any, layers: frozenset[int]) -> StateSpec | None:
    """Returns the description of the layers of a model that are gated delta networks; None if it has no such layer.

    Args:
        config: A transformers config.
        layers: Numbers of these layers.

    Raises:
        UnsupportedModelError: A field is missing, or its value is not implemented.
    """
    return _state(config, layers, DELTA_FIELDS, "gated_delta")


def _state(
    config: Any, layers: frozenset[int], names: Mapping[str, str], rule: Literal["mamba2", "gated_delta"]
) -> StateSpec | None:
    """Returns the description of the layers; a flag that `names` lacks is false."""
    one_of(config, names["activation"], ("silu",))
    num_heads, num_groups = positive_int(config, names["num_heads"]), positive_int(config, names["num_groups"])
    if num_heads % num_groups:
        raise UnsupportedModelError(
            f"config field {names['num_groups']!r} is {num_groups}; it must divide {names['num_heads']}={num_heads}"
        )
    width = positive_int(config, names["conv_width"])
    if not 2 <= width <= MAX_CONV_WIDTH:
        raise UnsupportedModelError(f"config field {names['conv_width']!r} is {width}; it can be 2 to {MAX_CONV_WIDTH}")
    state = StateSpec(
        layers=layers,
        rule=rule,
        num_heads=num_heads,
        head_dim=positive_int(config, names["head_dim"]),
        num_groups=num_groups,
        state_size=positive_int(config, names["state_size"]),
        conv_width=width,
        conv_bias="conv_bias" in names and flag(config, names["conv_bias"], True),
        bias="bias" in names and flag(config, names["bias"], False),
    )
    return state if layers else None
