"""`rope_parameters`: the rotary positions of a GGUF file, as config.json describes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import UnsupportedModelError, quote
from .header import GgufHeader

__all__ = ["FACTORS", "ROPE_KEYS", "rope_parameters"]

ROPE_KEYS = (
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)

FACTORS = "rope_freqs"
"""Name of the tensor by whose numbers the frequencies are divided. Llama 3.1 and its successors have one."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The parameters of Llama 3.1, which no file holds; the factors that follow from them are compared with the file's."""


def rope_parameters(header: GgufHeader, head_dim: int) -> dict[str, Any]:
    """Returns the field `rope_parameters` of config.json.

    Args:
        header: The header of the file.
        head_dim: Size of a head.

    Raises:
        UnsupportedModelError: The scaling is not implemented.
    """
    theta, rotated = _number(header, "rope.freq_base", 10000.0), _number(header, "rope.dimension_count", head_dim)
    partial = {} if rotated == head_dim else {"partial_rotary_factor": rotated / head_dim}
    kind = header.own("rope.scaling.type", "none")
    factors = next((tensor for tensor in header.tensors if tensor.name == f"{FACTORS}.weight"), None)
    if factors is not None and kind == "none":
        data = header.file.read_bytes(factors.start, factors.start + factors.num_bytes)
        return {"rope_theta": theta, **partial, **_llama3(header, np.frombuffer(data, np.float32), theta)}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta, **partial}
    if kind not in ("linear", "yarn") or factors is not None:
        raise UnsupportedModelError(
            f"{header.file}: rope.scaling.type is {quote(kind)}; none, linear and yarn are implemented, and the "
            f"factors of {FACTORS} without any"
        )
    given = {
        "factor": header.own("rope.scaling.factor"),
        "original_max_position_embeddings": header.own("rope.scaling.original_context_length"),
    }
    present = {name: value for name, value in given.items() if value is not None}
    return {"rope_type": kind, "rope_theta": theta, **partial, **present}


def _number(header: GgufHeader, key: str, default: float) -> float:
    value = header.own(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UnsupportedModelError(f"{header.file}: {key} is {quote(value)}; it must be a positive number")
    return float(value)


def _llama3(header: GgufHeader, found: np.ndarray, theta: float) -> dict[str, Any]:
    """Returns the parameters of Llama 3.1 whose factors are those of the file."""
    parameters: dict[str, Any] = {"rope_type": "llama3", "factor": float(found.max(initial=0.0)), **LLAMA3}
    expected = _llama3_factors(theta, len(found), parameters) if parameters["factor"] > 0 else np.zeros(0)
    if len(expected) != len(found) or not np.allclose(expected, found, rtol=1e-3):
        raise UnsupportedModelError(
            f"{header.file}: the numbers of {FACTORS} are not those of Llama 3.1; only its scaling is implemented "
            "(or set rope_parameters with hf_overrides on the original checkpoint)"
        )
    return parameters


def _llama3_factors(theta: float, count: int, parameters: dict[str, Any]) -> np.ndarray:
    """Returns the numbers that divide the frequencies theta^(-i / count) (Llama Team, 2024, arXiv:2407.21783)."""
    trained, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(count) / count)
    smooth = (trained / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < trained / high, 1.0, np.where(wavelengths > trained / low, factor, between))
