"""What a pooled request gives back, under the names that users of vLLM know. Plain data: it pickles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

import numpy as np

from ..errors import RequestError
from ..outputs import RequestMetrics

__all__ = [
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "PoolingOutput",
    "PoolingRequestOutput",
    "ScoringOutput",
    "ScoringRequestOutput",
    "classes_of",
    "embedding_of",
]


@dataclass(slots=True, eq=False)
class PoolingOutput:
    """The vector of a prompt.

    Attributes:
        data: `[size]` float32; of a request with more prompts `[num_prompts, size]`.
    """

    data: np.ndarray


@dataclass(slots=True)
class EmbeddingOutput:
    """The embedding of a prompt.

    Attributes:
        embedding: Its numbers.
    """

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """The classes of a prompt.

    Attributes:
        probs: Probability of each class; logits where no activation was asked for.
    """

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.probs)


def embedding_of(pooled: PoolingOutput | None) -> EmbeddingOutput | None:
    """Returns a vector as an embedding; None of none."""
    return None if pooled is None else EmbeddingOutput(pooled.data.tolist())


def classes_of(pooled: PoolingOutput | None) -> ClassificationOutput | None:
    """Returns a vector as classes; None of none."""
    return None if pooled is None else ClassificationOutput(pooled.data.tolist())


@dataclass(slots=True)
class ScoringOutput:
    """How well two texts go together.

    Attributes:
        score: Higher is better: the cosine of two embeddings, or what a classifier of one class gives.
    """

    score: float


Output = TypeVar("Output")


@dataclass(slots=True)
class PoolingRequestOutput(Generic[Output]):
    """A pooled request and its result.

    Attributes:
        request_id: Unique identifier of the request.
        outputs: The result; None if the request failed.
        prompt_token_ids: The tokens the model saw, of more prompts one after another.
        num_cached_tokens: Prompt tokens whose KV cache was found rather than computed.
        finished: Whether it has ended.
        error: Why the request failed; None if it did not.
        prompt: Prompt text; None if the prompt was given as token ids only.
        metrics: Times of the request.
    """

    request_id: str
    outputs: Output | None
    prompt_token_ids: list[int] | None
    num_cached_tokens: int = 0
    finished: bool = True
    error: RequestError | None = None
    prompt: str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def num_generated_tokens(self) -> int:
        """0: a pooled request generates no token."""
        return 0

    @classmethod
    def from_base(cls, base: PoolingRequestOutput[Any], outputs: Output | None) -> Self:
        """Makes the output of a kind of task.

        Args:
            base: What the engine returned.
            outputs: Its result, as the task has it.
        """
        return cls(
            base.request_id,
            outputs,
            base.prompt_token_ids,
            base.num_cached_tokens,
            base.finished,
            base.error,
            base.prompt,
            base.metrics,
        )


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """A request and its embedding."""


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """A request and its classes."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """A pair of texts and its score; of two embeddings, `prompt_token_ids` are those of both."""
