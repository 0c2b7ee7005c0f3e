"""`SeparateScoring`: the base of scorings whose model reads the two texts of a pair by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

from ...errors import ConfigError
from ...inputs import Parsed
from ..outputs import ScoringOutput, ScoringRequestOutput
from .pairs import Pair
from .scoring import Pooled, ScoringOptions
from .similarity import Similarity, cosine, max_sim

__all__ = ["EmbeddingScoring", "LateScoring", "SeparateScoring"]


Key: TypeAlias = tuple[int, int]
"""The identities of a text and an adapter."""


@dataclass(frozen=True, slots=True)
class SeparateScoring:
    """Scoring by the similarity of the vectors of the two texts. A text that is in several pairs is run once.

    Attributes:
        similarity: Function that compares the vectors of two texts.
    """

    pooling_task: ClassVar[str]

    similarity: Similarity

    @classmethod
    def of(cls, options: ScoringOptions, *similarity: Similarity) -> Self:
        """Makes the scoring of a call.

        Args:
            options: What the call asks for.
            *similarity: The function of the model; none for the one of the class.

        Raises:
            ConfigError: The call asks for one prompt of both texts.
        """
        if options.chat_template is not None:
            raise ConfigError("chat_template joins the texts of a pair, and this model reads each by itself; drop it")
        return cls(*similarity)

    def prompts(self, pairs: Sequence[Pair]) -> list[Parsed]:
        """Returns one prompt for each text and adapter, see `Scoring.prompts`."""
        return [side for side, _ in _runs(pairs).values()]

    def adapters(self, pairs: Sequence[Pair]) -> list[Any]:
        """Returns the adapter of each prompt, see `Scoring.adapters`."""
        return [adapter for _, adapter in _runs(pairs).values()]

    def outputs(self, pairs: Sequence[Pair], pooled: Sequence[Pooled]) -> list[ScoringRequestOutput]:
        """Returns the similarity of the vectors of each pair, see `Scoring.outputs`."""
        output_of = dict(zip(_runs(pairs), pooled, strict=True))
        return [self._output(*(output_of[key] for key in _keys(pair))) for pair in pairs]

    def _output(self, first: Pooled, second: Pooled) -> ScoringRequestOutput:
        """Returns the score of a pair; an error of either text is the error of the pair."""
        output = ScoringRequestOutput.from_base(first, None)
        output.request_id = f"{first.request_id}_{second.request_id}"
        output.prompt = None
        output.prompt_token_ids = (first.prompt_token_ids or []) + (second.prompt_token_ids or [])
        output.num_cached_tokens = first.num_cached_tokens + second.num_cached_tokens
        output.error = first.error or second.error
        if first.outputs is not None and second.outputs is not None:
            output.outputs = ScoringOutput(self.similarity(first.outputs.data, second.outputs.data))
        return output


@dataclass(frozen=True, slots=True)
class EmbeddingScoring(SeparateScoring):
    """Scoring by the similarity of the embeddings of the two texts."""

    pooling_task = "embed"

    similarity: Similarity = cosine


@dataclass(frozen=True, slots=True)
class LateScoring(SeparateScoring):
    """Scoring by late interaction: each token of the first text is matched with one of the second, see `max_sim`."""

    pooling_task = "token_embed"

    similarity: Similarity = max_sim


def _keys(pair: Pair) -> tuple[Key, Key]:
    return (id(pair.first), id(pair.adapter)), (id(pair.second), id(pair.adapter))


def _runs(pairs: Sequence[Pair]) -> dict[Key, tuple[Parsed, Any]]:
    """Returns the texts that must be run, each with its adapter."""
    return {key: (side, pair.adapter) for pair in pairs for key, side in zip(_keys(pair), pair.sides, strict=True)}
