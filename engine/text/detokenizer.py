"""Tokens back to text.

Text is made once, when a request has finished. Only a request with stop strings needs text while it runs:
`StopStringMatcher` grows it token by token.

A token alone has no text of its own: a tokenizer may strip a space at the start, and one character may span several
tokens. So the output is decoded together with the last tokens of the prompt, and their text is taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

NUM_CONTEXT_TOKENS = 5
"""Prompt tokens decoded along with the output, at first; a character has at most four bytes, so four tokens."""

INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are not a character (yet)."""


class Decoder(Protocol):
    """Anything that turns token ids into text."""

    def decode_ids(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Returns the text of the tokens."""
        ...


def decode_continuation(
    decoder: Decoder, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], skip_special_tokens: bool
) -> str:
    """Returns the text of an output as it continues its prompt.

    Args:
        decoder: The tokenizer.
        prompt_token_ids: Tokens before the output.
        output_token_ids: Tokens to turn into text.
        skip_special_tokens: Whether special tokens have no text.
    """
    context, before = _context(decoder, prompt_token_ids, skip_special_tokens)
    whole = decoder.decode_ids(context + list(output_token_ids), skip_special_tokens)
    return _added(before, whole)


def _context(decoder: Decoder, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> tuple[list[int], str]:
    """Returns the last tokens of a prompt, as many as it takes to begin with a whole character, and their text.

    A tokenizer that falls back to bytes decodes a run of them all together or not at all.
    """
    num_tokens = NUM_CONTEXT_TOKENS
    while True:
        context = list(prompt_token_ids[-num_tokens:])
        text = decoder.decode_ids(context, skip_special_tokens)
        if num_tokens >= len(prompt_token_ids) or not text.startswith(INCOMPLETE):
            return context, text
        num_tokens *= 2


def _added(before: str, whole: str) -> str:
    """Returns what a longer text adds to a shorter one, whose last character it may complete."""
    if not whole.startswith(before):
        before = before.rstrip(INCOMPLETE)
    return whole[len(before) :]


class StopStringMatcher:
    """Grows the text of one output and finds the first stop string in it.

    Args:
        decoder: The tokenizer.
        prompt_token_ids: Tokens before the output.
        stop: The stop strings.
        skip_special_tokens: Whether special tokens have no text.
        include_stop: Whether the text keeps the stop string.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str],
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._decoder = decoder
        self._stop = list(stop)
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop
        # Tokens [start, read) have been turned into text; they are decoded again as context of the ones after.
        self._ids, _ = _context(decoder, prompt_token_ids, skip_special_tokens)
        self._start, self._read = 0, len(self._ids)
        self.text = ""
        self.matched: str | None = None

    def push(self, token_id: int, may_stop: bool = True) -> bool:
        """Takes the next token.

        Args:
            token_id: The token.
            may_stop: Whether a stop string completed by this token counts.

        Returns:
            Whether a stop string is complete; `matched` holds it and `text` is cut at it.
        """
        new_text = self._decode_new(token_id)
        num_old = len(self.text)
        self.text += new_text
        if new_text and may_stop:
            self._match(num_old)
        return self.matched is not None

    def _decode_new(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decoder.decode_ids(self._ids[self._start : self._read], self._skip_special_tokens)
        whole = self._decoder.decode_ids(self._ids[self._start :], self._skip_special_tokens)
        added = "" if whole.endswith(INCOMPLETE) else _added(before, whole)
        if added:
            self._start, self._read = self._read, len(self._ids)
        return added

    def _match(self, num_old: int) -> None:
        """Finds the match that completes first; of several that complete together, the first listed."""
        found = []
        for order, stop in enumerate(self._stop):
            begin = self.text.find(stop, max(0, num_old - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), order, begin))
        if not found:
            return
        end, order, begin = min(found)
        self.matched = self._stop[order]
        self.text = self.text[: end if self._include_stop else begin]
