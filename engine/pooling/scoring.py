"""`Scoring`: how `LLM.score` makes prompts of pairs of texts, and scores of their vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, PromptTypeError
from ..inputs import Parsed, attempt, encode_pair, parse_prompt
from ..text.tokenizer import Tokenizer
from .outputs import PoolingOutput, PoolingRequestOutput, ScoringOutput, ScoringRequestOutput

__all__ = ["CosineScoring", "PairScoring", "Scoring", "pair_up"]

Pooled = PoolingRequestOutput[PoolingOutput]


def pair_up(data_1: Any, data_2: Any) -> list[tuple[str, str]]:
    """Returns the pairs of texts that the two arguments of `LLM.score` describe.

    Args:
        data_1: One text, or a list of texts. One text is paired with every text of `data_2`.
        data_2: One text, or a list of texts, as many as in `data_1` unless `data_1` is one text.

    Raises:
        PromptTypeError: A value is no text.
        ConfigError: The numbers of texts do not match.
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
    """Scores pairs of texts for a task: makes the prompts to pool, and turns the vectors of the prompts into scores."""

    def prompts(self, pairs: Sequence[tuple[str, str]]) -> list[Parsed]:
        """Returns the prompts to pool, in the order of the pairs; an error in the place of one that cannot be run."""
        ...

    def outputs(self, pooled: Sequence[Pooled]) -> list[ScoringRequestOutput]:
        """Returns the score of each pair, from the outputs of all prompts, in the order of the prompts."""
        ...


@dataclass(frozen=True, slots=True)
class PairScoring:
    """Scoring by a classifier with one class, which reads both texts of a pair as one prompt.

    Attributes:
        tokenizer: Tokenizer that joins the two texts with the separators that the model expects.
    """

    tokenizer: Tokenizer

    def prompts(self, pairs: Sequence[tuple[str, str]]) -> list[Parsed]:
        """Returns one prompt of token ids for each pair, see `Scoring.prompts`."""
        return [attempt(encode_pair, self.tokenizer, *pair) for pair in pairs]

    def outputs(self, pooled: Sequence[Pooled]) -> list[ScoringRequestOutput]:
        """Returns the probability of the class for each pair, see `Scoring.outputs`."""
        return [score_output(one) for one in pooled]


class CosineScoring:
    """Scoring by the cosine of the embeddings of the two texts of a pair."""

    def prompts(self, pairs: Sequence[tuple[str, str]]) -> list[Parsed]:
        """Returns two prompts for each pair, its texts, see `Scoring.prompts`."""
        return [attempt(parse_prompt, text) for pair in pairs for text in pair]

    def outputs(self, pooled: Sequence[Pooled]) -> list[ScoringRequestOutput]:
        """Returns the cosine of vectors 2 i and 2 i + 1 as the score of pair i, see `Scoring.outputs`."""
        return [cosine_output(*two) for two in zip(pooled[::2], pooled[1::2], strict=True)]


def score_output(pooled: Pooled) -> ScoringRequestOutput:
    """Returns the score of a pair: the first number of the vector that a classifier has computed for its prompt."""
    score = None if pooled.outputs is None else ScoringOutput(float(pooled.outputs.data[0]))
    return ScoringRequestOutput.from_base(pooled, score)


def cosine_output(first: Pooled, second: Pooled) -> ScoringRequestOutput:
    """Returns the score of a pair: the cosine of the embeddings of its texts. An error of either text is kept."""
    output = ScoringRequestOutput.from_base(first, None)
    output.prompt_token_ids = (first.prompt_token_ids or []) + (second.prompt_token_ids or [])
    output.num_cached_tokens = first.num_cached_tokens + second.num_cached_tokens
    output.error = first.error or second.error
    if first.outputs is not None and second.outputs is not None:
        a, b = first.outputs.data, second.outputs.data
        length = max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12)
        output.outputs = ScoringOutput(float(a @ b) / length)
    return output
