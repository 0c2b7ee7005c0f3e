"""`PoolingRequestOutput`: the result of a pooling request, with vLLM's names. It is plain data and can be pickled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

import numpy as np

from ..errors import RequestError
from ..lora.request import LoRARequest
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
    """The vector of a prompt, or the vectors of its tokens.

    Attributes:
        data: `[size]` float32; `[num_prompts, size]` if the request has more than one prompt; `[num_tokens, size]` if
            it asks for a vector of each token.
        labels: Names of the classes that the elements of a vector belong to; empty for embeddings.
    """

    data: np.ndarray
    labels: tuple[str, ...] = ()


@dataclass(slots=True)
class EmbeddingOutput:
    """The embedding of a prompt.

    Attributes:
        embedding: Numbers of the embedding.
    """

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Length of the embedding."""
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """The probabilities of the classes for a prompt.

    Attributes:
        probs: Probability of each class; the logit of each class if the request switches the activation off.
        labels: Name of each class, from the model's config.
    """

    probs: list[float]
    labels: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.probs)

    @property
    def label(self) -> str | None:
        """Name of the most probable class; None if the classes have no names."""
        return self.labels[int(np.argmax(self.probs))] if self.labels else None


def embedding_of(pooled: PoolingOutput | None) -> EmbeddingOutput | None:
    """Returns the embedding that a vector holds; None for None, which stands for a failed request."""
    return None if pooled is None else EmbeddingOutput(pooled.data.tolist())


def classes_of(pooled: PoolingOutput | None) -> ClassificationOutput | None:
    """Returns the probabilities that a vector holds; None for None, which stands for a failed request."""
    return None if pooled is None else ClassificationOutput(pooled.data.tolist(), pooled.labels)


@dataclass(slots=True)
class ScoringOutput:
    """The similarity score of two texts.

    Attributes:
        score: Cosine of two embeddings, or probability of the one class of a classifier; higher is more similar.
    """

    score: float


Output = TypeVar("Output")


@dataclass(slots=True)
class PoolingRequestOutput(Generic[Output]):
    """The result of one pooling request.

    Attributes:
        request_id: Id of the request.
        outputs: The vector, embedding, probabilities or score; None if the request failed.
        prompt_token_ids: Token ids of the prompt; the token ids of several prompts follow each other.
        num_cached_tokens: Number of prompt tokens whose keys and values were found in the prefix cache.
        finished: Whether the request has ended.
        error: Error of a failed request; None if the request succeeded.
        prompt: Text of the prompt; None if no text was given.
        metrics: Durations and preemptions of the request.
        lora_request: Names the adapter that the request was run with; None for the model alone.
    """

    request_id: str
    outputs: Output | None
    prompt_token_ids: list[int] | None
    num_cached_tokens: int = 0
    finished: bool = True
    error: RequestError | None = None
    prompt: str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    lora_request: LoRARequest | None = None

    @property
    def num_generated_tokens(self) -> int:
        """0, because a pooling request generates no tokens."""
        return 0

    @classmethod
    def from_base(cls, base: PoolingRequestOutput[Any], outputs: Output | None) -> Self:
        """Makes an output of this class from the output of the engine, with another form of the vector.

        Args:
            base: Output of the engine.
            outputs: The vector in the form that this class holds; None if the request failed.
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
            base.lora_request,
        )


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """The result of `LLM.embed` for one prompt."""


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """The result of `LLM.classify` for one prompt."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """The result of `LLM.score` for one pair. `prompt_token_ids` holds the token ids of both texts."""
