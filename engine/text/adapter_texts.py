"""`ModelTexts`: warns of an adapter whose folder has a chat template or tokens that the model does not have.

Trainers save a tokenizer beside an adapter. It is not used (docs/decisions/0054-requests-with-adapters.md), so an
adapter that was trained with another one gets prompts that it does not expect.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from ..errors import MillraceError, quote
from ..storage import Location, read_json_object
from .tokenizer import Tokenizer

__all__ = ["ModelTexts"]

logger = logging.getLogger(__name__)

TEMPLATE, SETTINGS, TOKENS = "chat_template.jinja", "tokenizer_config.json", "added_tokens.json"
"""The files of a tokenizer that may differ between a model and its adapter."""

MAX_BYTES = 16 << 20
"""Most bytes of such a file that are read; a larger one is passed over."""


@dataclass(frozen=True, slots=True)
class ModelTexts:
    """The chat templates and the tokens of a model. They are copied, because adapters are read on another thread.

    Attributes:
        templates: Chat templates, without white space around them.
        tokens: Spellings of the tokens in the vocabulary.
    """

    templates: frozenset[str]
    tokens: frozenset[str]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Returns the chat templates and the tokens of a tokenizer."""
        return cls(frozenset(map(str.strip, tokenizer.templates)), frozenset(tokenizer.hf.get_vocab()))

    def compare(self, name: str, folder: Location) -> None:
        """Logs a warning if an adapter's folder has another chat template, or tokens that the model does not have.

        Args:
            name: Name of the adapter.
            folder: Folder of the adapter.
        """
        try:
            settings = _object(folder / SETTINGS)
            templates = set(map(str.strip, _templates(folder, settings)))
            tokens = {*_object(folder / TOKENS), *_added_tokens(settings)}
        except (MillraceError, OSError, UnicodeDecodeError) as error:
            logger.warning("files beside the adapter %s cannot be read, and are not used: %s", quote(name), error)
            return
        if templates and not templates & self.templates:
            logger.warning(
                "the adapter %s has a chat template of its own, which is not used: conversations are rendered by that "
                "of the model; pass the text of the adapter's as chat_template to use it",
                quote(name),
            )
        if unknown := sorted(tokens - self.tokens):
            logger.warning(
                "the tokenizer of the model lacks tokens that the adapter %s has (%d, such as %s); prompts are "
                "tokenised without them",
                quote(name),
                len(unknown),
                quote(unknown[0]),
            )


def _templates(folder: Location, settings: dict[str, Any]) -> Iterator[str]:
    """Yields the chat templates in an adapter's folder."""
    file, given = folder / TEMPLATE, settings.get("chat_template")
    if file.exists() and file.size() <= MAX_BYTES:
        yield file.read_text()
    for one in given if isinstance(given, list) else [given]:
        text = one.get("template") if isinstance(one, dict) else one
        if isinstance(text, str):
            yield text


def _added_tokens(settings: dict[str, Any]) -> Iterator[str]:
    """Yields the tokens that a `tokenizer_config.json` adds to a vocabulary."""
    added = settings.get("added_tokens_decoder")
    for one in added.values() if isinstance(added, dict) else ():
        if isinstance(one, dict) and isinstance(one.get("content"), str):
            yield one["content"]


def _object(file: Location) -> dict[str, Any]:
    return read_json_object(file) if file.exists() and file.size() <= MAX_BYTES else {}
