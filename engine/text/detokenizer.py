"""`decode_continuation` turns an output into text, `split_text` splits it; `StopStringMatcher` finds stop strings.

Text is made once, when a sequence has finished. Only a sequence with stop strings needs text while it runs:
`StopStringMatcher` decodes it token by token.

The text of a token depends on the tokens before it: a tokenizer may strip a space at the start of a text, and one
character may consist of several tokens. So the output is decoded together with the last tokens of the prompt, and the
text of the prompt tokens is then removed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Protocol

NUM_CONTEXT_TOKENS = 5
"""Number of prompt tokens decoded with the output at first. A character has at most 4 bytes, so at most 4 tokens."""

INCOMPLETE = "\ufffd"
"""The character that a decoder writes for bytes that are no complete character."""


class Decoder(Protocol):
    """Protocol of the tokenizers that this module needs: a method that turns token ids into text."""

    def decode_ids(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Returns the text of the tokens."""
        ...


def decode_continuation(
    decoder: Decoder, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], skip_special_tokens: bool
) -> str:
    """Returns the text of an output, decoded as the continuation of its prompt.

    Args:
        decoder: The tokenizer.
        prompt_token_ids: Token ids of the prompt.
        output_token_ids: Token ids of the output.
        skip_special_tokens: Whether special tokens are left out of the text.
    """
    context, before = _context(decoder, prompt_token_ids, skip_special_tokens)
    whole = decoder.decode_ids(context + list(output_token_ids), skip_special_tokens)
    return _added(before, whole)


def _context(decoder: Decoder, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> tuple[list[int], str]:
    """Returns the last tokens of a prompt and their text, with enough tokens to begin with a whole character.

    A tokenizer with byte fallback decodes a whole run of byte tokens to `INCOMPLETE` if the run begins inside a
    character.
    """
    num_tokens = NUM_CONTEXT_TOKENS
    while True:
        context = list(prompt_token_ids[-num_tokens:])
        text = decoder.decode_ids(context, skip_special_tokens)
        if num_tokens >= len(prompt_token_ids) or not text.startswith(INCOMPLETE):
            return context, text
        num_tokens *= 2


def _added(before: str, whole: str) -> str:
    """Returns the text of `whole` after `before`, from the last character on if `before` ends within a character."""
    if not whole.startswith(before):
        before = before.rstrip(INCOMPLETE)
    return whole[len(before) :]


class TokenDecoder:
    """Decodes one output token by token.

    Args:
        decoder: The tokenizer.
        prompt_token_ids: Token ids of the prompt.
        skip_special_tokens: Whether special tokens are left out of the text.
    """

    def __init__(self, decoder: Decoder, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        # Tokens [start, read) are decoded already. They are decoded again as the context of the tokens after them.
        self._ids, _ = _context(decoder, prompt_token_ids, skip_special_tokens)
        self._start, self._read = 0, len(self._ids)

    def push(self, token_id: int) -> str:
        """Returns the text that the next token adds; a part of a character adds none until the last part adds all."""
        self._ids.append(token_id)
        before = self._decoder.decode_ids(self._ids[self._start : self._read], self._skip_special_tokens)
        whole = self._decoder.decode_ids(self._ids[self._start :], self._skip_special_tokens)
        added = "" if whole.endswith(INCOMPLETE) else _added(before, whole)
        if added:
            self._start, self._read = self._read, len(self._ids)
        return added


def split_text(
    decoder: Decoder,
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int],
    text: str,
    skip_special_tokens: bool,
) -> list[str]:
    """Splits the text of an output into the parts that its tokens add; joined, the parts are the text.

    The token that completes a character adds all of it. The last token also adds what is left.

    Args:
        decoder: The tokenizer.
        prompt_token_ids: Token ids of the prompt.
        output_token_ids: Token ids of the output.
        text: Text of the output, which may be cut at a stop string: tokens after the cut add nothing.
        skip_special_tokens: Whether special tokens are left out of the text.
    """
    tokens = TokenDecoder(decoder, prompt_token_ids, skip_special_tokens)
    ends = list(itertools.accumulate(len(tokens.push(token_id)) for token_id in output_token_ids))
    return [text[start:end] for start, end in itertools.pairwise([0, *ends[:-1], len(text)])] if ends else []


class StopStringMatcher:
    """Decodes one output token by token and finds the first stop string in its text.

    Args:
        decoder: The tokenizer.
        prompt_token_ids: Token ids of the prompt.
        stop: The stop strings.
        skip_special_tokens: Whether special tokens are left out of the text.
        include_stop: Whether the text includes the stop string.
        special_tokens: Texts of the special tokens. If a stop string holds one, special tokens are decoded while
            the matcher looks for stop strings; `skip_special_tokens` then removes them from the text before the match.

    Attributes:
        text: Text of the output so far, cut at the stop string.
        matched: The stop string that was found; None while there is none.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str],
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        special_tokens: Collection[str] = (),
    ) -> None:
        self._stop = list(stop)
        sees_special = any(token in one for token in special_tokens for one in stop)
        self._hidden = sorted(special_tokens, key=len, reverse=True) if sees_special and skip_special_tokens else []
        self._tokens = TokenDecoder(decoder, prompt_token_ids, skip_special_tokens and not sees_special)
        self._include_stop = include_stop
        self.text = ""
        self.matched: str | None = None

    def push(self, token_id: int, may_stop: bool = True) -> bool:
        """Appends the next token to the text, and looks for a stop string that it completes.

        Args:
            token_id: The token id.
            may_stop: Whether the token may end the output. If False, a stop string that it completes is ignored.

        Returns:
            Whether a stop string was found. If so, it is in `matched`, and `text` is cut before it, or after it if
            outputs include the stop string.
        """
        new_text = self._tokens.push(token_id)
        num_old = len(self.text)
        self.text += new_text
        if new_text and may_stop:
            self._match(num_old)
        return self.matched is not None

    def _match(self, num_old: int) -> None:
        """Searches `text` for stop strings that end after its first `num_old` characters.

        If several stop strings are found, the string that ends first counts; if several end together, the first in the
        list. This string is stored in `matched`, and `text` is cut before it, or after it if outputs include it.
        """
        found = []
        for order, stop in enumerate(self._stop):
            begin = self.text.find(stop, max(0, num_old - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), order, begin))
        if not found:
            return
        _, order, begin = min(found)
        self.matched = self._stop[order]
        self.text = self._shown(self.text[:begin]) + (self.matched if self._include_stop else "")

    def _shown(self, text: str) -> str:
        """Returns the text without the special tokens that were decoded only to find stop strings."""
        for token in self._hidden:
            text = text.replace(token, "")
        return text
