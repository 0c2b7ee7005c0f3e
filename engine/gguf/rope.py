"""`rope_parameters`: the rotary positions of a GGUF file, as config.json describes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import UnsupportedModelError, quote
from .header import GgufHeader

__all__ = ["FACTORS", "LONG", "ROPE_KEYS", "SHORT", "rope_parameters"]

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

SHORT, LONG = "rope_factors_short", "rope_factors_long"
"""Names of the two such tensors of the type longrope."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The parameters of Llama 3.1, which no file holds; the factors that follow from them are compared with the file's."""


def rope_parameters(header: GgufHeader, head_dim: int, window_theta: float = 0.0) -> dict[str, Any]:
    """Returns the field `rope_parameters` of config.json.

    Args:
        header: The header of the file.
        head_dim: Size of a head.
        window_theta: As `Architecture.window_theta`.

    Raises:
        UnsupportedModelError: The scaling is not implemented.
    """
    rotated = _number(header, "rope.dimension_count", head_dim)
    partial = {} if rotated == head_dim else {"partial_rotary_factor": rotated / head_dim}
    base = {"rope_theta": _number(header, "rope.freq_base", 10000.0), **partial}
    found = {**base, **_scaling(header, base["rope_theta"])}
    if not window_theta:
        return found
    local = _number(header, "rope.freq_base_swa", window_theta)
    windows = {"rope_type": "default", "rope_theta": local, **partial}
    return {"full_attention": found, "sliding_attention": windows}


def _scaling(header: GgufHeader, theta: float) -> dict[str, Any]:
    """Returns the type of scaling and its parameters."""
    kind = header.own("rope.scaling.type", "none")
    trained = header.own("rope.scaling.original_context_length")
    of_trained = {} if trained is None else {"original_max_position_embeddings": trained}
    factors = {name: _read_factors(header, name) for name in (FACTORS, SHORT, LONG) if header.has(f"{name}.weight")}
    if kind in ("none", "longrope") and set(factors) == {SHORT, LONG}:
        lists = {"short_factor": factors[SHORT].tolist(), "long_factor": factors[LONG].tolist()}
        scale = {"attention_factor": _number(header, "rope.scaling.attn_factor", 1.0)}
        return {"rope_type": "longrope", **of_trained, **lists, **scale}
    if kind == "none" and set(factors) == {FACTORS}:
        return _llama3(header, factors[FACTORS], theta)
    if kind == "none" and not factors:
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn") or factors:
        raise UnsupportedModelError(
            f"{header.file}: rope.scaling.type is {quote(kind)}, with the tensors {quote(sorted(factors))}; none, "
            f"linear and yarn are implemented without tensors, and none with {FACTORS}, or with {SHORT} and {LONG}"
        )
    return {"rope_type": kind, "factor": _number(header, "rope.scaling.factor", 1.0), **of_trained}


def _read_factors(header: GgufHeader, name: str) -> np.ndarray:
    """Returns the numbers of one of the tensors of factors."""
    tensor = next(tensor for tensor in header.tensors if tensor.name == f"{name}.weight")
    if tensor.type_name != "F32":
        raise UnsupportedModelError(f"{tensor.file}: {tensor.name} holds {tensor.type_name}; F32 is implemented")
    return np.frombuffer(tensor.file.read_bytes(tensor.start, tensor.start + tensor.num_bytes), np.float32)


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
