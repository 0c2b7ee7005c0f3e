"""`PairEncoder`: makes the token ids of pairs of texts, as the tokenizer does, and tokenises each text only once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from ..errors import PromptTypeError

__all__ = ["PairEncoder", "PairTokens", "Side"]

Side: TypeAlias = str | list[int]
"""One side of a pair: a text, or its token ids without special tokens."""

PROBES = (("a b", "c"), ("a", "b c d"), ("a b c d", ""))
"""Pairs from which the template of a tokenizer is found; what is found from the first must explain the others."""


@dataclass(frozen=True, slots=True)
class PairTokens:
    """A pair of texts as one prompt.

    Attributes:
        token_ids: Token ids of the prompt, special tokens included.
        num_first_tokens: Number of leading tokens, which have token type 0; the others have type 1. None if all have
            type 0, or the model reads no types.
    """

    token_ids: list[int]
    num_first_tokens: int | None


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """The special tokens around the two texts of a pair.

    Attributes:
        before: Token ids before the first text.
        between: Token ids between the texts.
        after: Token ids after the second text.
        num_first_specials: Number of these tokens that have token type 0, if the tokens of the second text have type 1;
            None if all tokens have type 0.
    """

    before: list[int]
    between: list[int]
    after: list[int]
    num_first_specials: int | None

    @property
    def num_specials(self) -> int:
        """Number of the special tokens."""
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, first: list[int], second: list[int]) -> PairTokens:
        """Returns the prompt of two texts, from their token ids."""
        token_ids = [*self.before, *first, *self.between, *second, *self.after]
        specials = self.num_first_specials
        return PairTokens(token_ids, None if specials is None else specials + len(first))


class PairEncoder:
    """Makes the token ids of pairs of texts, with the separators that the model expects.

    The special tokens of a tokenizer around two texts are found once, from pairs that it encodes. A text that is in
    many pairs, such as a query with a thousand documents, is then tokenised once. A tokenizer whose pairs are no texts
    with special tokens around them encodes each pair by itself.

    Args:
        hf: The tokenizer of Hugging Face.
    """

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self._has_types = "token_type_ids" in hf.model_input_names

    def encode(self, pairs: Sequence[tuple[Side, Side]], max_tokens: int | None = None) -> list[PairTokens]:
        """Returns the prompt of each pair.

        Args:
            pairs: The pairs.
            max_tokens: Number of tokens, special tokens included, that longer pairs are cut to: the end of the longer
                text is cut off first, or its beginning if the tokenizer says so. None for no cut.

        Raises:
            PromptTypeError: Sides are token ids, and the tokenizer takes only pairs of texts.
        """
        template = self._template
        if template is None:
            return self._encode_whole(pairs, max_tokens)
        texts = list(dict.fromkeys(side for pair in pairs for side in pair if isinstance(side, str)))
        ids_of = dict(zip(texts, self._encode_texts(texts), strict=True))
        sides = [[ids_of[side] if isinstance(side, str) else side for side in pair] for pair in pairs]
        room = None if max_tokens is None else max(0, max_tokens - template.num_specials)
        return [template.join(*self._cut(first, second, room)) for first, second in sides]

    @cached_property
    def _template(self) -> PairTemplate | None:
        """The special tokens of a pair; None if pairs of this tokenizer are made in another way."""
        if not self._hf.is_fast:
            return None
        encodings = self._hf(*map(list, zip(*PROBES, strict=True))).encodings
        template = _find_template(encodings[0], has_types=self._has_types)
        if template is None:
            return None
        for probe, encoding in zip(PROBES, encodings, strict=True):
            joined = template.join(*self._encode_texts(probe))
            num_first = None if template.num_first_specials is None else encoding.type_ids.count(0)
            if (joined.token_ids, joined.num_first_tokens) != (encoding.ids, num_first):
                return None
        return template

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of texts, without special tokens, from the Rust tokenizer itself, which is faster."""
        backend = self._hf.backend_tokenizer
        # A tokenizer.json may ask for both; calls of Hugging Face's tokenizer set them anew.
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _encode_whole(self, pairs: Sequence[tuple[Side, Side]], max_tokens: int | None) -> list[PairTokens]:
        if not all(isinstance(side, str) for pair in pairs for side in pair):
            raise PromptTypeError("this tokenizer joins only texts to a pair; give both sides of each pair as text")
        if not pairs:
            return []
        cut = {} if max_tokens is None else {"truncation": "longest_first", "max_length": max_tokens}
        # Lists make a pair of an empty second text too; beside a single text, an empty one would be ignored.
        firsts, seconds = map(list, zip(*pairs, strict=True))
        encoded = self._hf(firsts, seconds, return_attention_mask=False, return_token_type_ids=True, **cut)
        rows = zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
        return [PairTokens(ids, _num_first(types) if self._has_types else None) for ids, types in rows]

    def _cut(self, first: list[int], second: list[int], room: int | None) -> tuple[list[int], list[int]]:
        """Returns two texts without the tokens for which there is no room; the longer text loses tokens first."""
        if room is None or len(first) + len(second) <= room:
            return first, second
        shorter = min(len(first), len(second), room // 2)
        if len(first) <= len(second):
            return self._kept(first, shorter), self._kept(second, room - shorter)
        return self._kept(first, room - shorter), self._kept(second, shorter)

    def _kept(self, token_ids: list[int], length: int) -> list[int]:
        start = len(token_ids) - length if self._hf.truncation_side == "left" else 0
        return token_ids[start : start + length]


def _find_template(encoding: Any, *, has_types: bool) -> PairTemplate | None:
    """Returns the special tokens around the texts of an encoded pair; None if the texts do not follow each other."""
    ids, owners = encoding.ids, encoding.sequence_ids
    if 0 not in owners or 1 not in owners:
        return None
    starts, ends = zip(*[(owners.index(side), len(ids) - owners[::-1].index(side)) for side in (0, 1)], strict=True)
    if ends[0] > starts[1]:
        return None
    num_first = _num_first(encoding.type_ids) if has_types else None
    return PairTemplate(
        before=ids[: starts[0]],
        between=ids[ends[0] : starts[1]],
        after=ids[ends[1] :],
        num_first_specials=None if num_first is None else num_first - (ends[0] - starts[0]),
    )


def _num_first(types: Sequence[int]) -> int | None:
    """Returns the number of tokens of type 0, which must come first; None if all tokens have type 0."""
    num_first = list(types).count(0)
    if list(types) != [0] * num_first + [1] * (len(types) - num_first):
        raise PromptTypeError(f"token types are 0, then 1; the tokenizer gives a pair the types {sorted(set(types))}")
    return None if num_first == len(types) else num_first
