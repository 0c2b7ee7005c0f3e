"""`Embed`: the task that makes an embedding of each prompt from its hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from ..config import EngineConfig
from ..errors import ConfigError, UnsupportedModelError, quote
from ..loading.model_source import locate_model
from ..models import describe_model
from ..pooling.config import PoolerConfig
from ..pooling.pooler import Pooler, normalize
from ..pooling.scoring import EmbeddingScoring, LateScoring, Scoring, ScoringOptions, find_similarity
from ..pooling.sentence_transformer import read_sentence_transformer, read_text_settings
from ..step.pooling_head import FirstTokenHead, LastTokenHead, MaxHead, MeanHead, PoolingHead
from ..text.tokenizer import TextSettings
from .pool import PoolingTask

__all__ = ["Embed"]

HEAD_WEIGHTS = frozenset(
    f"score{layer}.{name}" for layer in ("", ".dense", ".norm", ".out") for name in ("weight", "bias")
)
"""Names of all weights that the head of a classifier may have; an encoder without a task often has some of them."""

HEADS: dict[str | None, type[PoolingHead]] = {
    None: LastTokenHead,
    "LAST": LastTokenHead,
    "MEAN": MeanHead,
    "CLS": FirstTokenHead,
    "MAX": MaxHead,
}
"""`PoolerConfig.pooling_type` -> the head, which makes the vectors at the end of a step."""


@dataclass(frozen=True)
class Embed(PoolingTask):
    """The task that makes an embedding of each prompt.

    Attributes:
        trained_sizes: Lengths of embeddings that the model was trained for; None if its config does not say.
    """

    name = "embed"
    architecture_endings = ("Model", "ForMaskedLM", "ForPreTraining")
    takes_any_model = True
    unused_weights = frozenset({"lm_head.weight", "lm_head.bias", *HEAD_WEIGHTS})

    trained_sizes: tuple[int, ...] | None = None

    @classmethod
    def create(cls, config: EngineConfig, hf_config: Any) -> Self:
        """Makes the task, see `Task.create`. Pooler settings of the engine replace settings in the model's folder."""
        own = PoolerConfig.read(config.pooler_config)
        hidden_size = describe_model(hf_config).output_size
        modules = read_sentence_transformer(locate_model(config.model, config.hub, with_weights=False), hidden_size)
        pooling = own.over(modules.pooling)
        sizes = getattr(hf_config, "matryoshka_dimensions", None)
        task = cls(
            Pooler(pooling, normalize, modules.steps),
            HEADS[pooling.pooling_type],
            modules.embedding_size(hidden_size),
            _check_sizes(sizes) if sizes else None,
        )
        if pooling.dimensions is not None and (problem := task.problem_of(pooling.dimensions)) is not None:
            raise ConfigError(f"pooler_config: {problem}")
        return task

    @classmethod
    def text_settings(cls, config: EngineConfig) -> TextSettings:
        """Returns the default prompt and the length limit of a sentence transformer, see `Task.text_settings`."""
        return read_text_settings(locate_model(config.model, config.hub, with_weights=False))

    def problem_of(self, dimensions: int) -> str | None:
        """Returns why an embedding cannot have this length, see `PoolingTask.problem_of`."""
        if self.trained_sizes is not None and dimensions not in self.trained_sizes:
            trained = ", ".join(map(str, self.trained_sizes))
            return f"dimensions={dimensions}, but the model was trained for {trained}; use these"
        if dimensions > self.size:
            return f"dimensions={dimensions}, but the model's embeddings have {self.size}; use at most so many"
        return None

    def scoring(self, options: ScoringOptions) -> Scoring:
        """Returns the scoring by two embeddings, or by the vectors of all tokens if asked, see `Task.scoring`."""
        by_token = getattr(self, "pools_tokens", False) if options.params.task is None else False
        if by_token or options.params.task == LateScoring.pooling_task:
            return LateScoring.of(options)
        return EmbeddingScoring.of(options, find_similarity(getattr(self, "similarity", None)))


def _check_sizes(sizes: Any) -> tuple[int, ...]:
    """Returns the lengths of embeddings that a config lists; raises if they are no positive integers."""
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise UnsupportedModelError(
            f"config field 'matryoshka_dimensions' is {quote(sizes)}; it must be a list of positive integers"
        )
    return tuple(sizes)
