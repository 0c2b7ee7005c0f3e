"""`rope_spec`: the rotary frequencies of a config. The scaled types are computed by functions of transformers."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedModelError, quote
from .hf_config import MAX_INT, is_positive_number, positive_int
from .spec import RopeSpec

__all__ = ["rope_max_positions", "rope_spec"]

# "dynamic" changes its frequencies only when a sequence is longer than max_position_embeddings, and rope_max_positions
# allows no longer sequence. "longrope" switches tables within that length, so it is not implemented.
_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

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


def rope_spec(config: Any) -> RopeSpec:
    """Computes the rotary frequencies that a config asks for.

    Args:
        config: A transformers config with `rope_parameters`.

    Returns:
        Frequencies in float32 precision, and the factor on cosine and sine.

    Raises:
        UnsupportedModelError: The rope type is not implemented, or its parameters are incomplete.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = _parameters(config)
    try:
        inv_freq, scaling = _default_inv_freq(config, parameters["rope_theta"]), 1.0
        if parameters["rope_type"] != "default":
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"config field 'rope_parameters' is {quote(parameters)}: {error!r:.200}") from error
    if not is_positive_number(scaling) or not torch.isfinite(inv_freq).all():
        raise UnsupportedModelError(
            f"config field 'rope_parameters' is {quote(parameters)}; no finite frequencies follow from its numbers"
        )
    return RopeSpec(tuple(inv_freq.tolist()), float(scaling))


def rope_max_positions(config: Any) -> int:
    """Returns the number of positions for which a config's rotary parameters are made.

    `linear` and `yarn` multiply the length with which the model was trained by their factor. That length is
    `original_max_position_embeddings` if the config has the field. In some configs `max_position_embeddings` is the
    length before the multiplication and in others the length after it, so the larger number is returned.

    Args:
        config: A transformers config with `rope_parameters`.
    """
    max_positions = positive_int(config, "max_position_embeddings")
    parameters = _parameters(config)
    if parameters["rope_type"] not in ("linear", "yarn"):
        return max_positions
    trained = parameters.get("original_max_position_embeddings") or max_positions
    scaled = trained * parameters.get("factor", 1.0)
    if not is_positive_number(scaled, MAX_INT):
        raise UnsupportedModelError(
            f"config field 'rope_parameters' is {quote(parameters)}: its positions are more than {MAX_INT}"
        )
    return max(max_positions, int(scaled))


def _parameters(config: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope_type = parameters.get("rope_type")
    if rope_type not in _TYPES:
        raise UnsupportedModelError(
            f"config field 'rope_parameters' is {quote(parameters)}; implemented rope types: {', '.join(_TYPES)}, the "
            "same for all layers"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"config field 'partial_rotary_factor' is {quote(parameters['partial_rotary_factor'])}; only whole heads "
            "(1.0) are rotated"
        )
    for name in ("rope_theta", *(name for name in _NUMBERS if parameters.get(name) is not None)):
        if not is_positive_number(parameters.get(name)):
            raise UnsupportedModelError(
                f"rope_parameters: {name!r} is {quote(parameters.get(name))}; it must be a positive, finite number"
            )
    return parameters


def _default_inv_freq(config: Any, theta: float) -> torch.Tensor:
    """Returns the frequencies theta^(-2i / head_dim), i in 0 .. head_dim / 2 - 1 (Su et al., 2021, section 3.2.2)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponents
