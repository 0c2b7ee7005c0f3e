"""`Classify`: the task that computes the probabilities of the model's classes for each prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from ..config import EngineConfig
from ..errors import ConfigError
from ..loading.head_rows import find_head_rows
from ..models import describe_model
from ..models.hf_config import flag
from ..pooling.config import PoolerConfig
from ..pooling.pooler import Pooler, class_activation
from ..pooling.scoring import ClassScoring, Scoring, ScoringOptions
from ..step.pooling_head import ClassHead, FirstClassHead, MeanClassHead, PoolingHead
from ..weights.head_rows import HeadRows
from .pool import PoolingTask

__all__ = ["Classify"]


HEADS: dict[str, type[PoolingHead]] = {"LAST": ClassHead, "CLS": FirstClassHead, "MEAN": MeanClassHead}
"""`HeadSpec.pooling` -> the head."""


@dataclass(frozen=True)
class Classify(PoolingTask):
    """The task that computes the probabilities of the model's classes for each prompt.

    Attributes:
        separates: Whether a pair of texts has the separators of the tokenizer between them.
    """

    name = "classify"
    architecture_endings = ("ForSequenceClassification", "ForTokenClassification")
    model_head = "score"
    unused_weights = frozenset({"lm_head.weight", "lm_head.bias"})

    head_rows: HeadRows | None = None
    separates: bool = True

    @classmethod
    def create(cls, config: EngineConfig, hf_config: Any) -> Self:
        """Makes the task, see `Task.create`."""
        own = PoolerConfig.read(config.pooler_config)
        if own.pooling_type not in (None, "LAST") or own.dimensions is not None:
            raise ConfigError("pooler_config: a classifier reads the last token, and all of its classes are given")
        spec = describe_model(hf_config)
        pooler = Pooler(own, class_activation(hf_config, spec.num_labels))
        rows = find_head_rows(config, hf_config)
        separates = flag(hf_config, "use_sep_token", default=rows is None)
        return cls(pooler, HEADS[spec.class_pooling], spec.num_labels, head_rows=rows, separates=separates)

    def problem_of(self, dimensions: int) -> str | None:
        """Returns why `dimensions` cannot be set: only embeddings can be shortened, see `PoolingTask.problem_of`."""
        return "dimensions are those of an embedding, and this engine classifies; drop them"

    def scoring(self, options: ScoringOptions) -> Scoring:
        """Returns the scoring by one class of a pair of texts, see `Task.scoring`."""
        return ClassScoring.of(options, self.size, separates=self.separates)
