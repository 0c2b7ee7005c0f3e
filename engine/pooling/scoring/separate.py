"""`SeparateScoring`: the base of scorings whose model reads the two texts of a pair by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...errors import ConfigError
from ...inputs import Parsed
from ..outputs import ScoringOutput, ScoringRequestOutput
from .pairs import Pair
from .scoring import Pooled, ScoringOptions, ScoringPlan
from .similarity import Similarity, cosine, max_sim

__all__ = ["EmbeddingScoring", "LateScoring", "SeparateScoring"]


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

    def plan(self, pairs: Sequence[Pair], adapters: Sequence[Any]) -> ScoringPlan:
        """Returns one prompt for each text and adapter, see `Scoring.plan`."""
        places: dict[tuple[int, int], int] = {}
        prompts: list[Parsed] = []
        of_prompts: list[Any] = []
        places_of_pairs = []
        for pair, adapter in zip(pairs, adapters, strict=True):
            keys = [(id(side), id(adapter)) for side in pair]
            for key, side in zip(keys, pair, strict=True):
                if key not in places:
                    places[key] = len(prompts)
                    prompts.append(side)
                    of_prompts.append(adapter)
            places_of_pairs.append([places[key] for key in keys])

        def finish(pooled: Sequence[Pooled]) -> list[ScoringRequestOutput]:
            return [self._output(pooled[first], pooled[second]) for first, second in places_of_pairs]

        return ScoringPlan(prompts, of_prompts, finish)

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
