"""`make_pooling_stage`: the stage of a pooling engine, with the columns that its task adds to a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..pooling.answers import Answers, ClassAnswers, RewardAnswers, VectorAnswers
from ..pooling.model import class_labels, pooling_task
from ..pooling.pairs import ScoreAnswers
from ..pooling.vectors import VECTOR_FORMS
from ..stages.backends.engine import EngineClient
from ..stages.backends.pooling import PoolingStage, ScoreStage
from ..stages.tokenizers import load_tokenizer
from .config import EngineProcessorConfig

if TYPE_CHECKING:
    from ...engine.pooling.scoring import Scoring


def answers_of(config: EngineProcessorConfig) -> Answers:
    """Returns the object that makes the columns of an answer; for scores, one that knows only their types.

    Args:
        config: Settings of a processor with a pooling engine.

    Raises:
        CheckpointError: The config of a classifier cannot be read.
    """
    return _ANSWERS[config.task_type](config)


def make_pooling_stage(
    config: EngineProcessorConfig, client: EngineClient, settings: Mapping[str, Any]
) -> PoolingStage:
    """Returns the stage of a pooling engine.

    Args:
        config: Settings of the processor.
        client: Client of the pool.
        settings: Settings of `EngineStage`.
    """
    own = {
        "params": config.default_pooling_params,
        "task_params": config.task.pooling,
        "has_fixed_size": config.embedding_dtype is not None or config.task_type == "token_embed",
        **settings,
    }
    if not config.reads_pairs:
        return PoolingStage(client, answers=answers_of(config), **own)
    scoring, names = make_scoring(config), config.score_columns
    return ScoreStage(client, scoring=scoring, names=names, answers=ScoreAnswers(scoring, names), **own)


def make_scoring(config: EngineProcessorConfig) -> Scoring:
    """Returns the object that makes prompts of pairs of texts, and scores of their vectors.

    Args:
        config: Settings of the processor.

    Raises:
        ConfigError: The model cannot score pairs.
    """
    from ...engine.pooling.scoring import ScoringOptions  # It loads torch.

    engine = config.engine_config
    task = pooling_task(engine)
    tokenizer = load_tokenizer(
        config.tokenizer_source,
        model=engine.model,
        task=task.name,
        hub=engine.tokenizer_hub,
        model_hub=engine.hub,
        trust_remote_code=engine.trust_remote_code,
    )
    return task.scoring(ScoringOptions(config.default_pooling_params, tokenizer))


def _vectors(config: EngineProcessorConfig) -> VectorAnswers:
    form = None if config.embedding_dtype is None else VECTOR_FORMS[config.embedding_dtype]
    return VectorAnswers(form, is_by_token=config.task_type == "token_embed")


def _classes(config: EngineProcessorConfig) -> ClassAnswers:
    return ClassAnswers(class_labels(config.engine_config), is_by_token=config.task_type == "token_classify")


_ANSWERS: Mapping[str, Callable[[EngineProcessorConfig], Answers]] = {
    "embed": _vectors,
    "token_embed": _vectors,
    "classify": _classes,
    "token_classify": _classes,
    "reward": lambda config: RewardAnswers(),
    "score": lambda config: ScoreAnswers(names=config.score_columns),
}
"""Value of `task_type` -> function that makes the `Answers` of a processor."""
