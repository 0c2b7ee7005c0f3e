"""`Embed`: the task that makes an embedding of each prompt from its hidden states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from ..config import EngineConfig
from ..errors import ConfigError, PoolingParamsError, UnsupportedModelError, quote
from ..loading.model_source import locate_model
from ..models import describe_model
from ..pooling.config import PoolerConfig
from ..pooling.pooler import Pooler, normalize
from ..pooling.scoring import EmbeddingScoring, LateScoring, Scoring, ScoringOptions, find_similarity
from ..pooling.sentence_transformer import read_sentence_transformer, read_text_settings
from ..step.pooling_mode import FirstToken, LastToken, Max, Mean, MeanSqrtLen, PoolingMode, WeightedMean
from ..text.tokenizer import TextSettings
from .pool import PoolingTask, check_chunks

__all__ = ["MODES", "Embed"]

HEAD_WEIGHTS = frozenset(
    f"score{layer}.{name}" for layer in ("", ".dense", ".norm", ".out") for name in ("weight", "bias")
)
"""Names of all weights that the head of a classifier may have; an encoder without a task often has some of them."""

MODES: dict[str, type[PoolingMode]] = {
    "CLS": FirstToken,
    "MAX": Max,
    "MEAN": Mean,
    "MEAN_SQRT_LEN": MeanSqrtLen,
    "WEIGHTEDMEAN": WeightedMean,
    "LAST": LastToken,
}
"""Pooling type -> the mode, which makes the vectors at the end of a step."""


@dataclass(frozen=True)
class Embed(PoolingTask):
    """The task that makes an embedding of each prompt, or of each token.

    Attributes:
        trained_sizes: Lengths of embeddings that the model was trained for; None if its config does not say.
        similarity: How embeddings of the model are compared, as sentence-transformers names it.
    """

    name = "embed"
    token_task = "token_embed"
    architecture_endings = ("Model", "ForMaskedLM", "ForPreTraining")
    takes_any_model = True
    unused_weights = frozenset({"lm_head.weight", "lm_head.bias", *HEAD_WEIGHTS})

    trained_sizes: tuple[int, ...] | None = None
    similarity: str = "cosine"

    @classmethod
    def create(cls, config: EngineConfig, hf_config: Any) -> Self:
        """Makes the task, see `Task.create`. Pooler settings of the engine replace settings in the model's folder."""
        own, spec = PoolerConfig.read(config.pooler_config), describe_model(hf_config)
        place = locate_model(config.model, config.hub, with_weights=False)
        modules = read_sentence_transformer(place, spec.output_size, own.types)
        pooling = own.over(modules.pooling)
        if not pooling.types:
            pooling = replace(pooling, pooling_type="CLS" if spec.is_encoder else "LAST")
        check_chunks(pooling)
        if (pooling.logit_mean, pooling.logit_sigma) != (None, None):
            raise ConfigError("pooler_config: logit_mean and logit_sigma are for the logits of classes; drop them")
        sizes = getattr(hf_config, "matryoshka_dimensions", None)
        task = cls(
            Pooler(pooling, normalize, modules.steps, modules.token_steps),
            tuple(MODES[name] for name in pooling.types),
            modules.size,
            config.task == cls.token_task or own.pools_tokens,
            modules.includes_prompt,
            _check_sizes(sizes) if sizes else None,
            modules.similarity,
        )
        task.check_config()
        return task

    @classmethod
    def text_settings(cls, config: EngineConfig) -> TextSettings:
        """Returns the prompts and the length limit of a sentence transformer, see `Task.text_settings`."""
        settings = read_text_settings(locate_model(config.model, config.hub, with_weights=False))
        if PoolerConfig.read(config.pooler_config).enable_chunked_processing:
            return replace(settings, max_tokens=None)
        return settings

    def check_classes(self, numbers: tuple[int, ...]) -> None:
        """Raises, because an embedding has no classes, see `PoolingTask.check_classes`."""
        raise PoolingParamsError("returned_token_ids are classes of a classifier, and this engine embeds; drop them")

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
        if self.wants_tokens(options.params):
            return LateScoring.of(options)
        return EmbeddingScoring.of(options, find_similarity(self.similarity))


def _check_sizes(sizes: Any) -> tuple[int, ...]:
    """Returns the lengths of embeddings that a config lists; raises if they are no positive integers."""
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise UnsupportedModelError(
            f"config field 'matryoshka_dimensions' is {quote(sizes)}; it must be a list of positive integers"
        )
    return tuple(sizes)
