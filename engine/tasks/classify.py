"""`Classify`: the task that computes the probabilities of the model's classes for each prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from ..config import EngineConfig
from ..errors import ConfigError, PoolingParamsError
from ..loading.head_rows import find_head_rows
from ..loading.model_source import locate_model
from ..models import describe_model
from ..models.hf_config import flag
from ..pooling.config import PoolerConfig
from ..pooling.pooler import Pooler, class_activation
from ..pooling.scoring import ClassScoring, Scoring, ScoringOptions
from ..pooling.sentence_transformer import read_cross_encoder_activation, read_cross_encoder_texts
from ..step.pooling_head import ClassHead
from ..text.tokenizer import TextSettings
from ..weights.head_rows import HeadRows
from .embed import MODES
from .pool import PoolingTask

__all__ = ["Classify"]

TOKEN_ENDINGS = ("ForTokenClassification", "ForRewardModel", "ForProcessRewardModel")
"""Endings of the names of architectures that were trained to classify, or to reward, each token."""


@dataclass(frozen=True)
class Classify(PoolingTask):
    """The task that computes the probabilities of the model's classes for each prompt, or for each token.

    Attributes:
        names: Names of the classes.
        separates: Whether a pair of texts has the separators of the tokenizer between them.
    """

    name = "classify"
    token_task = "token_classify"
    architecture_endings = ("ForSequenceClassification", *TOKEN_ENDINGS)
    model_head = "score"
    unused_weights = frozenset({"lm_head.weight", "lm_head.bias"})
    head_type = ClassHead

    names: tuple[str, ...] = ()
    head_rows: HeadRows | None = None
    separates: bool = True

    @classmethod
    def create(cls, config: EngineConfig, hf_config: Any) -> Self:
        """Makes the task, see `Task.create`."""
        own, spec = PoolerConfig.read(config.pooler_config), describe_model(hf_config)
        if len(own.types) > 1 or own.dimensions is not None:
            raise ConfigError("pooler_config: a classifier reads one vector of a prompt, and gives all of its classes")
        (pooling_type,) = own.types or (spec.class_pooling,)
        pooling = replace(own, pooling_type=pooling_type)
        if pooling.enable_chunked_processing:
            raise ConfigError("pooler_config: enable_chunked_processing is for embeddings; a classifier has no mean")
        of_tokens = hf_config.architectures[0].endswith(TOKEN_ENDINGS) and config.task not in ("classify", "score")
        rows = find_head_rows(config, hf_config)
        activation = read_cross_encoder_activation(locate_model(config.model, config.hub, with_weights=False))
        task = cls(
            Pooler(pooling, class_activation(hf_config, spec.num_labels, activation)),
            (MODES[pooling_type],),
            spec.num_labels,
            config.task == cls.token_task or own.pools_tokens or (of_tokens and own.task is None),
            names=_names_of_classes(hf_config, spec.num_labels),
            head_rows=rows,
            separates=flag(hf_config, "use_sep_token", default=rows is None),
        )
        task.check_config()
        return task

    @classmethod
    def text_settings(cls, config: EngineConfig) -> TextSettings:
        """Returns the length limit of a cross-encoder, see `Task.text_settings`."""
        return read_cross_encoder_texts(locate_model(config.model, config.hub, with_weights=False))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, see `PoolingTask.labels`."""
        return self.names

    def check_classes(self, numbers: tuple[int, ...]) -> None:
        """Raises if the model has no classes of these numbers, see `PoolingTask.check_classes`."""
        if max(numbers) >= self.size:
            raise PoolingParamsError(f"returned_token_ids holds {max(numbers)}, and the model has {self.size} classes")

    def problem_of(self, dimensions: int) -> str | None:
        """Returns why `dimensions` cannot be set: only embeddings can be shortened, see `PoolingTask.problem_of`."""
        return "dimensions are those of an embedding, and this engine classifies; drop them"

    def scoring(self, options: ScoringOptions) -> Scoring:
        """Returns the scoring by one class of a pair of texts, see `Task.scoring`."""
        return ClassScoring.of(options, self.size, separates=self.separates)


def _names_of_classes(hf_config: Any, num_labels: int) -> tuple[str, ...]:
    """Returns the names of the classes by their numbers; `LABEL_0` and so on for those without one."""
    names = getattr(hf_config, "id2label", None) or {}
    return tuple(str(names.get(i, f"LABEL_{i}")) for i in range(num_labels))
