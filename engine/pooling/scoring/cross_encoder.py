"""`ClassScoring`: scores pairs of texts by a classifier with one class, which reads both texts as one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...errors import ConfigError, PromptTypeError, UserError
from ...inputs import Parsed, ParsedPrompt, attempt, encode_pairs
from ...text.pair_encoder import Side
from ...text.tokenizer import Tokenizer
from ..outputs import ScoringOutput, ScoringRequestOutput
from .pairs import Pair
from .scoring import Pooled, ScoringOptions

__all__ = ["ClassScoring"]

Joined: TypeAlias = list[Parsed]
Sides: TypeAlias = tuple[Side, Side]


@dataclass(frozen=True, slots=True)
class ClassScoring:
    """Scoring by the one class of a classifier, which reads both texts of a pair as one prompt.

    Attributes:
        join: Makes the prompt of each of several pairs.
    """

    join: Callable[[Sequence[Sides]], Joined]

    pooling_task = "classify"

    @classmethod
    def of(cls, options: ScoringOptions, num_labels: int, *, separates: bool) -> ClassScoring:
        """Makes the scoring of a call.

        Args:
            options: What the call asks for. A chat template renders a pair as messages of the roles `query` and
                `document`.
            num_labels: Number of classes of the model.
            separates: Whether the tokenizer puts its separators between the texts of a pair, as cross-encoders expect.
                A model that was made to generate reads the two texts as one.

        Raises:
            ConfigError: The model has several classes, or the engine has no tokenizer to join texts with.
        """
        tokenizer, max_tokens = options.tokenizer, options.max_tokens
        if num_labels != 1:
            raise ConfigError(
                f"score takes an embedding model or a classifier of one class; this one has {num_labels} (num_labels "
                "of its config), so call classify, or encode, and read the classes yourself"
            )
        template = options.chat_template or (tokenizer and tokenizer.own_template)
        if template is None and not separates:
            return cls(lambda pairs: [attempt(_append, *pair) for pair in pairs])
        if tokenizer is None:
            raise ConfigError(
                "score needs a tokenizer to join two texts; construct the LLM without skip_tokenizer_init"
            )
        if template is not None:
            return cls(lambda pairs: [attempt(_render, tokenizer, template, *pair) for pair in pairs])
        return cls(lambda pairs: encode_pairs(tokenizer, pairs, max_tokens))

    def prompts(self, pairs: Sequence[Pair]) -> list[Parsed]:
        """Returns one prompt for each pair, see `Scoring.prompts`."""
        read = [attempt(_sides, pair) for pair in pairs]
        joined = iter(self.join([sides for sides in read if not isinstance(sides, UserError)]))
        return [sides if isinstance(sides, UserError) else next(joined) for sides in read]

    def adapters(self, pairs: Sequence[Pair]) -> list[Any]:
        """Returns the adapter of each pair, see `Scoring.adapters`."""
        return [pair.adapter for pair in pairs]

    def outputs(self, pairs: Sequence[Pair], pooled: Sequence[Pooled]) -> list[ScoringRequestOutput]:
        """Returns the probability of the class for each pair, see `Scoring.outputs`."""
        return [_output(one) for one in pooled]


def _sides(pair: Pair) -> Sides:
    """Returns the two texts of a pair, or their token ids; raises the error of a side that is none."""
    return _side(pair.first), _side(pair.second)


def _side(side: Parsed) -> Side:
    if isinstance(side, UserError):
        raise side
    if side.cache_salt is not None:
        raise PromptTypeError("a side of a pair has a cache_salt; a model that reads both texts as one takes none")
    if side.token_ids is not None:
        return side.token_ids
    if side.text is None:
        raise PromptTypeError("a side of a pair is embeddings; a model that reads both texts as one takes texts")
    return side.text


def _render(tokenizer: Tokenizer, template: str, first: Side, second: Side) -> ParsedPrompt:
    """Returns the prompt of two texts that a chat template renders."""
    if not isinstance(first, str) or not isinstance(second, str):
        raise PromptTypeError("a chat template takes texts; give both sides of a pair as text, not as token ids")
    messages = [{"role": "query", "content": first}, {"role": "document", "content": second}]
    return ParsedPrompt(tokenizer.render_chat(messages, chat_template=template, add_generation_prompt=False))


def _append(first: Side, second: Side) -> ParsedPrompt:
    """Returns the prompt of two texts that follow each other, or of their token ids."""
    if isinstance(first, str) and isinstance(second, str):
        return ParsedPrompt(first + second)
    if isinstance(first, str) or isinstance(second, str):
        raise PromptTypeError("a pair has a text and token ids, which this model reads as one; give both in one form")
    return ParsedPrompt(token_ids=first + second)


def _output(pooled: Pooled) -> ScoringRequestOutput:
    score = None if pooled.outputs is None else ScoringOutput(float(pooled.outputs.data[0]))
    return ScoringRequestOutput.from_base(pooled, score)
