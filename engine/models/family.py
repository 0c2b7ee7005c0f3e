"""`Family`: how the configs of a model family are read, how its weights are named, and which module runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..weights.checkpoint import WeightMap
from .decoder import Decoder
from .spec import DecoderSpec, HeadSpec

__all__ = ["CLASSIFIER", "NUM_REWARDS", "TOKEN_CLASSIFIER", "Family"]

CLASSIFIER, TOKEN_CLASSIFIER = "ForSequenceClassification", "ForTokenClassification"
"""Endings of the names of architectures that classify texts, or each of their tokens."""

NUM_REWARDS = {"ForRewardModel": 1, "ForProcessRewardModel": 2}
"""Endings of the names of decoders that reward a text or the steps of a solution -> the number of their classes."""


def _decoder_heads() -> Mapping[str, HeadSpec | Callable[[Any], HeadSpec]]:
    rewards = dict.fromkeys(NUM_REWARDS, HeadSpec(activation="relu", bias=True))
    return {CLASSIFIER: HeadSpec(), TOKEN_CLASSIFIER: HeadSpec(bias=True), **rewards}


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models: one function turns all their configs into specs.

    Attributes:
        architectures: Names of the family in a config's `architectures`: for decoders those that generate, e.g.
            `LlamaForCausalLM`, for encoders those without a head, e.g. `BertModel`.
        spec: Function that turns a config of these architectures into a spec. It raises
            `UnsupportedModelError`, which names the field, for a value that is not implemented.
        weights: Map from the names of weights in checkpoints to the names in our models, or a function from a spec to
            this map, if checkpoints have tensors whose layout depends on the sizes of the model.
        build: Callable with the arguments of `Decoder` that makes the model from its spec. A family whose models are
            not plain decoders sets a function of its own.
        heads: The head of a classifier, by the ending of its architecture, or a function that reads it from a config.
    """

    architectures: tuple[str, ...]
    spec: Callable[[Any], DecoderSpec]
    weights: WeightMap | Callable[[DecoderSpec], WeightMap]
    build: Callable[..., Decoder] = Decoder
    heads: Mapping[str, HeadSpec | Callable[[Any], HeadSpec]] = field(default_factory=_decoder_heads)

    def head(self, ending: str, config: Any) -> HeadSpec:
        """Returns the head of the classifiers whose architecture has this ending."""
        head = self.heads[ending]
        return head(config) if callable(head) else head

    def weight_map(self, spec: DecoderSpec) -> WeightMap:
        """Returns the map from the names of weights in checkpoints of a model to the names in our model."""
        return self.weights if isinstance(self.weights, WeightMap) else self.weights(spec)
