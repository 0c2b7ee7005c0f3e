"""`TASK_TYPES`: the tasks that a processor or a job may have, with what each asks of the engine and adds to a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from .. import columns

TaskName: TypeAlias = Literal["generate", "embed", "classify", "score", "token_embed", "token_classify", "reward"]


@dataclass(frozen=True, slots=True)
class TaskType:
    """A task of a processor.

    Attributes:
        name: Value of `task_type`.
        answers: Columns that the task adds to a row. A job writes them, and the first is the answer, which the job's
            `output_column` names.
        engine: Settings of the engine that the task needs.
        pooling: Fields of the `PoolingParams` of each request, unless the row sets them.
        makes_vectors: Whether the answer is a vector, or one of each token, in the type that `embedding_dtype` names.
        reads_pairs: Whether a row has pairs of texts in place of a prompt.
    """

    name: TaskName
    answers: tuple[str, ...]
    engine: Mapping[str, Any] = field(default_factory=dict)
    pooling: Mapping[str, Any] = field(default_factory=dict)
    makes_vectors: bool = False
    reads_pairs: bool = False

    @property
    def is_pooling(self) -> bool:
        """Whether the engine computes vectors and generates no text."""
        return bool(self.engine)


_EMBEDS, _CLASSIFIES = {"task": "embed"}, {"task": "classify"}
_VECTORS = (columns.EMBEDDINGS, columns.EMBEDDING_SCALE)
_CLASSES = (columns.PROBS, columns.LABEL, columns.LABEL_PROBABILITY)

TASK_TYPES: Mapping[str, TaskType] = {
    one.name: one
    for one in (
        TaskType("generate", (columns.GENERATED_TEXT,)),
        TaskType("embed", _VECTORS, _EMBEDS, {"task": "embed"}, makes_vectors=True),
        TaskType("classify", _CLASSES, _CLASSIFIES, {"task": "classify"}),
        # An engine for scores does what its checkpoint is made for: it classifies pairs, or it embeds each text.
        TaskType("score", (columns.SCORE,), {"runner": "pooling"}, reads_pairs=True),
        TaskType("token_embed", _VECTORS, _EMBEDS, {"task": "token_embed"}, makes_vectors=True),
        TaskType("token_classify", _CLASSES, _CLASSIFIES, {"task": "token_classify"}),
        TaskType("reward", (columns.REWARD,), _CLASSIFIES, {"task": "classify", "use_activation": False}),
    )
}
"""Value of `task_type` -> the task."""
