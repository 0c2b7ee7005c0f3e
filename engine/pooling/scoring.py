"""Pairs of texts and their scores: what `LLM.score` is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, PromptTypeError
from ..text.tokenizer import Tokenizer
from .outputs import PoolingOutput, PoolingRequestOutput, ScoringOutput, ScoringRequestOutput

__all__ = ["CosineScoring", "PairScoring", "Scoring", "pair_up"]

Pooled = PoolingRequestOutput[PoolingOutput]


def pair_up(data_1: Any, data_2: Any) -> list[tuple[str, str]]:
    """Returns the pairs that two arguments of `LLM.score` stand for.

    Args:
        data_1: One text, or a list of them.
        data_2: One text or several. One text of the first goes with each of these, or else they go two by two.

    Raises:
        PromptTypeError: Something is no text.
        ConfigError: The lists have different lengths.
    """
    first, second = _texts("data_1", data_1), _texts("data_2", data_2)
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise ConfigError(
            f"score takes one text with many, or lists of the same length; got {len(first)} and {len(second)}"
        )
    return list(zip(first, second, strict=True))


def _texts(name: str, data: Any) -> list[str]:
    texts = [data] if isinstance(data, str) or not isinstance(data, Sequence) else list(data)
    for text in texts:
        if not isinstance(text, str):
            raise PromptTypeError(f"{name} must be a text or a list of texts; it holds a {type(text).__name__}")
    return texts


class Scoring(Protocol):
    """How a task scores pairs of texts: which prompts it reads, and how their vectors become scores."""

    def prompts(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """Returns the prompts to pool."""
        ...

    def outputs(self, pooled: Sequence[Pooled]) -> list[ScoringRequestOutput]:
        """Returns the score of each pair, from the outputs of its prompts."""
        ...


@dataclass(frozen=True, slots=True)
class PairScoring:
    """A classifier of one class reads both texts at once.

    Attributes:
        tokenizer: Joins two texts as the model was trained to read them.
    """

    tokenizer: Tokenizer

    def prompts(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """As `Scoring.prompts`: one prompt a pair."""
        return self.tokenizer.encode_pairs(pairs)

    def outputs(self, pooled: Sequence[Pooled]) -> list[ScoringRequestOutput]:
        """As `Scoring.outputs`."""
        return [score_output(one) for one in pooled]


class CosineScoring:
    """The embeddings of both texts are compared."""

    def prompts(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """As `Scoring.prompts`: two prompts a pair."""
        return [text for pair in pairs for text in pair]

    def outputs(self, pooled: Sequence[Pooled]) -> list[ScoringRequestOutput]:
        """As `Scoring.outputs`."""
        return [cosine_output(*two) for two in zip(pooled[::2], pooled[1::2], strict=True)]


def score_output(pooled: Pooled) -> ScoringRequestOutput:
    """Makes the score of a pair that a classifier of one class has read."""
    score = None if pooled.outputs is None else ScoringOutput(float(pooled.outputs.data[0]))
    return ScoringRequestOutput.from_base(pooled, score)


def cosine_output(first: Pooled, second: Pooled) -> ScoringRequestOutput:
    """Makes the score of two texts of their embeddings: the cosine of the angle between them."""
    output = ScoringRequestOutput.from_base(first, None)
    output.prompt_token_ids = (first.prompt_token_ids or []) + (second.prompt_token_ids or [])
    output.num_cached_tokens = first.num_cached_tokens + second.num_cached_tokens
    output.error = first.error or second.error
    if first.outputs is not None and second.outputs is not None:
        a, b = first.outputs.data, second.outputs.data
        length = max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12)
        output.outputs = ScoringOutput(float(a @ b) / length)
    return output
