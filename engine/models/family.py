"""`Family`: how the configs of a model family are read, how its weights are named, and which module runs it."""

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
    """A family of models: one function turns all their configs into specs.

    Attributes:
        architectures: Names of the family in a config's `architectures`, e.g. `LlamaForCausalLM`.
        spec: Function that turns a config of these architectures into a spec. It raises
            `UnsupportedModelError`, which names the field, for a value that is not implemented.
        weights: Map from the names of weights in checkpoints to the names in our models, or a function from a spec to
            this map, if checkpoints have tensors whose layout depends on the sizes of the model.
        build: Callable with the arguments of `Decoder` that makes the model from its spec. A family whose models are
            not plain decoders sets a function of its own.
    """

    architectures: tuple[str, ...]
    spec: Callable[[Any], DecoderSpec]
    weights: WeightMap | Callable[[DecoderSpec], WeightMap]
    build: Callable[..., Decoder] = Decoder

    def weight_map(self, spec: DecoderSpec) -> WeightMap:
        """Returns the map from the names of weights in checkpoints of a model to the names in our model."""
        return self.weights if isinstance(self.weights, WeightMap) else self.weights(spec)
