"""Models: families turn configs into a `DecoderSpec`, and one `Decoder` is built from any spec."""

from __future__ import annotations

from .decoder import Decoder
from .options import ModelOptions
from .registry import (
    build_model,
    describe_model,
    find_family,
    load_hf_config,
    load_model,
    supported_architectures,
    weight_map,
)
from .spec import DecoderSpec

__all__ = [
    "Decoder",
    "DecoderSpec",
    "ModelOptions",
    "build_model",
    "describe_model",
    "find_family",
    "load_hf_config",
    "load_model",
    "supported_architectures",
    "weight_map",
]
