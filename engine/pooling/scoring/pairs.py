"""`pair_up`: reads the two arguments of `LLM.score` as pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ...errors import ConfigError, PromptTypeError, UserError, quote, unknown_key_message
from ...inputs import Parsed, ParsedPrompt, attempt, describe, parse_prompt
from ...text.conversation import check_messages

__all__ = ["Pair", "pair_up"]

CONTENT = "content"


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two texts whose similarity is a score.

    Attributes:
        first: The first side: a prompt, or the error that says why it cannot be used.
        second: The second side.
        adapter: The LoRA request of the pair; None for the model alone.
    """

    first: Parsed
    second: Parsed
    adapter: Any = None

    @property
    def sides(self) -> tuple[Parsed, Parsed]:
        """Both sides."""
        return self.first, self.second


def pair_up(data_1: Any, data_2: Any) -> list[Pair]:
    """Returns the pairs that the two arguments of `LLM.score` describe. Equal texts become the same object.

    Args:
        data_1: One side, or a list of them. One side is paired with every side of `data_2`.
        data_2: One side, or a list of them, as many as in `data_1` unless `data_1` is one.

    Raises:
        ConfigError: The numbers of sides do not match.
    """
    texts: dict[str, ParsedPrompt] = {}
    first, second = ([_read(side, texts) for side in _sides(data)] for data in (data_1, data_2))
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise ConfigError(
            f"score takes one text with many, or lists of the same length; got {len(first)} and {len(second)}"
        )
    return [Pair(*sides) for sides in zip(first, second, strict=True)]


def _sides(data: Any) -> list[Any]:
    """Returns the sides of an argument; what is no collection of sides is one, and so is a list of token ids."""
    data = data.tolist() if hasattr(data, "tolist") else data
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        return [data]
    sides = list(data)
    return [sides] if sides and all(isinstance(side, Integral) for side in sides) else sides


def _read(side: Any, texts: dict[str, ParsedPrompt]) -> Parsed:
    if isinstance(side, Mapping) and CONTENT in side:
        side = attempt(_text_of, side)
    if isinstance(side, str):  # An empty text may be a prompt: the tokenizer adds special tokens.
        return texts.setdefault(side, ParsedPrompt(side))
    return side if isinstance(side, UserError) else attempt(parse_prompt, side)


def _text_of(side: Mapping[str, Any]) -> str:
    """Returns the text of a side with content parts."""
    for key in side:
        if key != CONTENT:
            raise PromptTypeError(unknown_key_message("a side of a pair with content", key, (CONTENT,)))
    content = side[CONTENT]
    if content is None:
        raise PromptTypeError(f"the content of a side of a pair must be a text or text parts; got {describe(content)}")
    try:
        check_messages([{"role": "user", CONTENT: content}])
    except UserError as error:
        raise PromptTypeError(f"a side of a pair holds {quote(side, 60)}: {error}") from error
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
