"""A model family: how its configs are read, what its checkpoints call our weights, and which module runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..weights.checkpoint import WeightMap
from .decoder import Decoder
from .spec import DecoderSpec

__all__ = ["Family"]


@dataclass(frozen=True, slots=True)
class Family:
    """Models that one function can describe.

    Attributes:
        architectures: Names in a config's `architectures`, e.g. `LlamaForCausalLM`.
        spec: Turns a config of these architectures into a spec; raises `UnsupportedModelError` naming a field.
        weights: Maps the names of weights in checkpoints to ours.
        build: Makes the module from the spec; takes the arguments of `Decoder`. A family whose models are not plain
            decoders brings its own.
    """

    architectures: tuple[str, ...]
    spec: Callable[[Any], DecoderSpec]
    weights: WeightMap
    build: Callable[..., Decoder] = Decoder
