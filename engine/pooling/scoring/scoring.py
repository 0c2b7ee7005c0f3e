"""`Scoring`: how `LLM.score` makes prompts of pairs of texts, and scores of the vectors of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ...inputs import Parsed
from ...text.tokenizer import Tokenizer
from ..outputs import PoolingOutput, PoolingRequestOutput, ScoringRequestOutput
from ..params import PoolingParams
from .pairs import Pair

__all__ = ["Pooled", "Scoring", "ScoringOptions", "ScoringPlan"]

Pooled: TypeAlias = PoolingRequestOutput[PoolingOutput]


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """What a call of `LLM.score` asks for.

    Attributes:
        params: Pooling parameters of all texts.
        tokenizer: Tokenizer of the engine, which may have none.
        chat_template: Jinja text of a template that renders each pair as one prompt; None for none.
        max_model_len: Most tokens of a prompt.
    """

    params: PoolingParams
    tokenizer: Tokenizer | None
    chat_template: str | None
    max_model_len: int

    @property
    def max_tokens(self) -> int | None:
        """Number of tokens that longer prompts are cut to; None for no cut."""
        asked = getattr(self.params, "truncate_prompt_tokens", None)
        return self.max_model_len if asked == -1 else asked


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    """The prompts of a call of `LLM.score`.

    Attributes:
        prompts: The prompts to pool; an error in the place of one that cannot be run.
        adapters: The LoRA request of each prompt.
        finish: Makes the score of each pair, in the order of the pairs, from the outputs of all prompts.
    """

    prompts: list[Parsed]
    adapters: list[Any]
    finish: Callable[[Sequence[Pooled]], list[ScoringRequestOutput]]


class Scoring(Protocol):
    """Scores pairs of texts for a task of an engine.

    Attributes:
        pooling_task: Pooling task of the prompts.
    """

    @property
    def pooling_task(self) -> str:
        """Name of the pooling task of the prompts."""
        ...

    def plan(self, pairs: Sequence[Pair], adapters: Sequence[Any]) -> ScoringPlan:
        """Returns the prompts of the pairs.

        Args:
            pairs: The pairs.
            adapters: The LoRA request of each pair.
        """
        ...
