"""`Classify`: the task that computes the probabilities of the model's classes for each prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from ..config import EngineConfig
from ..errors import ConfigError
from ..models import describe_model
from ..pooling.config import PoolerConfig
from ..pooling.pooler import Pooler, class_activation
from ..pooling.scoring import PairScoring, Scoring
from ..step.pooling_head import ClassHead, FirstClassHead, MeanClassHead, PoolingHead
from ..text.tokenizer import Tokenizer
from .pool import PoolingTask

__all__ = ["Classify"]


HEADS: dict[str, type[PoolingHead]] = {"LAST": ClassHead, "CLS": FirstClassHead, "MEAN": MeanClassHead}
"""`HeadSpec.pooling` -> the head."""


@dataclass(frozen=True)
class Classify(PoolingTask):
    """The task that computes the probabilities of the model's classes for each prompt."""

    name = "classify"
    architecture_endings = ("ForSequenceClassification", "ForTokenClassification")
    model_head = "score"
    unused_weights = frozenset({"lm_head.weight", "lm_head.bias"})

    @classmethod
    def create(cls, config: EngineConfig, hf_config: Any) -> Self:
        """Makes the task, see `Task.create`."""
        own = PoolerConfig.read(config.pooler_config)
        if own.pooling_type not in (None, "LAST") or own.dimensions is not None:
            raise ConfigError("pooler_config: a classifier reads the last token, and all of its classes are given")
        spec = describe_model(hf_config)
        activation = class_activation(hf_config, spec.num_labels)
        return cls(Pooler(own, activation), HEADS[spec.class_pooling], spec.num_labels)

    def problem_of(self, dimensions: int) -> str | None:
        """Returns why `dimensions` cannot be set: only embeddings can be shortened, see `PoolingTask.problem_of`."""
        return "dimensions are those of an embedding, and this engine classifies; drop them"

    def scoring(self, tokenizer: Tokenizer | None) -> Scoring:
        """Returns the scoring by one class of a pair of texts, see `Task.scoring`."""
        if self.size != 1 or tokenizer is None:
            raise ConfigError(f"score takes a tokenizer and a classifier of one class; this one has {self.size}")
        return PairScoring(tokenizer)
