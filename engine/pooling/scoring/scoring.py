"""`Scoring`: how `LLM.score` makes prompts of pairs of texts, and scores of the vectors of the prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ...inputs import Parsed
from ...text.tokenizer import Tokenizer
from ..outputs import PoolingOutput, PoolingRequestOutput, ScoringRequestOutput
from ..params import CUT_TO_LIMIT, PoolingParams
from .pairs import Pair

__all__ = ["Pooled", "Scoring", "ScoringOptions"]

Pooled: TypeAlias = PoolingRequestOutput[PoolingOutput]


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """What a call of `LLM.score` asks for.

    Attributes:
        params: Pooling parameters of all texts.
        tokenizer: Tokenizer of the engine, which may have none.
        chat_template: Jinja text of a template that renders each pair as one prompt; None for none.
        max_model_len: Most tokens of a prompt, to which long pairs are cut if asked; None if it is not known yet.
    """

    params: PoolingParams
    tokenizer: Tokenizer | None
    chat_template: str | None = None
    max_model_len: int | None = None

    @property
    def max_tokens(self) -> int | None:
        """Number of tokens that longer prompts are cut to; None for no cut. The model's folder may have a limit."""
        asked = self.params.truncate_prompt_tokens
        if asked is None and self.tokenizer is not None and self.tokenizer.texts.max_tokens is not None:
            return min(self.tokenizer.texts.max_tokens, self.max_model_len or sys.maxsize)
        return self.max_model_len if asked == CUT_TO_LIMIT else asked


class Scoring(Protocol):
    """Scores pairs of texts for a task of an engine: makes prompts of pairs, and scores of the vectors of the prompts.

    Attributes:
        pooling_task: Name of the pooling task of the prompts.
    """

    @property
    def pooling_task(self) -> str:
        """Name of the pooling task of the prompts."""
        ...

    def prompts(self, pairs: Sequence[Pair]) -> list[Parsed]:
        """Returns the prompts of the pairs; an error in the place of one that cannot be run."""
        ...

    def adapters(self, pairs: Sequence[Pair]) -> list[Any]:
        """Returns the LoRA request of each prompt."""
        ...

    def outputs(self, pairs: Sequence[Pair], pooled: Sequence[Pooled]) -> list[ScoringRequestOutput]:
        """Returns the score of each pair.

        Args:
            pairs: The pairs of which `prompts` has made the prompts, or others that were read from the same data.
            pooled: The outputs of all prompts, in the order of the prompts.
        """
        ...
