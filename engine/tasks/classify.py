"""The task that makes the probabilities of classes of each prompt: `Classify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from ..config import EngineConfig
from ..errors import ConfigError
from ..models import describe_model
from ..pooling.config import PoolerConfig
from ..pooling.pooler import Pooler, class_activation
from ..pooling.scoring import PairScoring, Scoring
from ..step.pooling_head import ClassHead
from ..text.tokenizer import Tokenizer
from .pool import PoolingTask

__all__ = ["Classify"]


@dataclass(frozen=True)
class Classify(PoolingTask):
    """Makes the probabilities of classes."""

    name = "classify"
    architecture_ending = "ForSequenceClassification"
    model_head = "score"
    unused_weights = frozenset({"lm_head.weight"})

    @classmethod
    def create(cls, config: EngineConfig, hf_config: Any) -> Self:
        """As `Task.create`."""
        own = PoolerConfig.read(config.pooler_config)
        if own.pooling_type == "MEAN" or own.dimensions is not None:
            raise ConfigError("pooler_config: a classifier reads the last token, and all of its classes are given")
        num_labels = describe_model(hf_config).num_labels
        return cls(Pooler(own, class_activation(hf_config, num_labels)), ClassHead, num_labels)

    def problem_of(self, dimensions: int) -> str | None:
        """As `PoolingTask.problem_of`."""
        return "dimensions are those of an embedding, and this engine classifies; drop them"

    def scoring(self, tokenizer: Tokenizer | None) -> Scoring:
        """As `Task.scoring`: the one class of a text pair."""
        if self.size != 1 or tokenizer is None:
            raise ConfigError(f"score takes a tokenizer and a classifier of one class; this one has {self.size}")
        return PairScoring(tokenizer)
