"""`ContentForms`: finds out in which form a chat template reads the contents of messages, by trying it.

Templates differ: some print a content as one text, some walk through its parts, and some do one for the user and the
other for the system. What a template does not read it leaves out, or prints with braces and quotes, without an error.
So a template renders the roles of a conversation with words in place of its texts, and the prompt shows which words it
has read.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from ..errors import quote

__all__ = ["ContentForm", "ContentForms", "Forms"]

logger = logging.getLogger(__name__)

ContentForm = Literal["string", "openai", "part"]
"""``"string"`` is one text, ``"openai"`` a list of parts of a text, ``"part"`` a list with one part."""

Forms = Mapping[str, frozenset[str]]
"""Role -> the forms in which the template reads the contents of its messages."""

MAX_KNOWN = 1024
"""Most templates and sequences of roles whose forms are remembered."""

MAX_TRIALS = 32
"""Most renderings of one conversation; two suffice unless the template raises an error for a form."""

Render = Callable[[list[dict[str, Any]]], str]


class ContentForms:
    """Finds the forms that templates read, and remembers them."""

    def __init__(self) -> None:
        self._known: Callable[..., list[Forms]] = lru_cache(MAX_KNOWN)(lambda *key: [])

    def find(self, render: Render, template: str, messages: Sequence[Mapping[str, Any]], names: Any) -> Forms:
        """Finds the forms in which a template reads the messages of a conversation.

        Args:
            render: Function that renders messages with the template, as the conversation is rendered.
            template: Jinja text.
            messages: The conversation.
            names: Hashable value that tells apart calls with other variables of the template.

        Returns:
            The forms of each role; ``"string"`` for a role whose texts the template shows in no form.
        """
        shape = tuple((message["role"], message.get("content") is None) for message in messages)
        known = self._known(template, shape, names)
        if not known:
            known.append(_find_forms(render, messages))
        return known[0]


def _find_forms(render: Render, messages: Sequence[Mapping[str, Any]]) -> Forms:
    roles = list(dict.fromkeys(message["role"] for message in messages if message.get("content") is not None))
    found: dict[tuple[str, bool], str | None] = {}
    for divided in itertools.islice(_trials(roles), MAX_TRIALS):
        if len(found) == 2 * len(roles):
            break
        try:
            prompt = render([_with_words(i, message, divided) for i, message in enumerate(messages)]).casefold()
        except Exception:  # noqa: BLE001  # A template may raise any error for a form that it does not read.
            continue
        for role in roles:
            places = [i for i, message in enumerate(messages) if message["role"] == role]
            found.setdefault((role, role in divided), _form_in(prompt, places, role in divided))
    forms = {role: frozenset(filter(None, (found.get((role, False)), found.get((role, True))))) for role in roles}
    if found and (lost := [role for role, read in forms.items() if not read]):
        logger.warning("the chat template shows no text of messages with the role %s", " or ".join(map(quote, lost)))
    return {role: read or frozenset({"string"}) for role, read in forms.items()}


def _trials(roles: Sequence[str]) -> Iterator[frozenset[str]]:
    """Yields the sets of roles whose contents are divided into parts: none, all, then every other set."""
    yield frozenset()
    yield frozenset(roles)
    for size in range(1, len(roles)):
        yield from map(frozenset, itertools.combinations(roles, size))


def _with_words(index: int, message: Mapping[str, Any], divided: frozenset[str]) -> dict[str, Any]:
    """Returns a message with words in place of its text; a template that prints whole parts prints the third word."""
    if message.get("content") is None:
        return dict(message)
    first, second, third = _words(index)
    if message["role"] not in divided:
        return {**message, "content": f"{first} {second}"}
    parts = [{"type": "text", "text": word, "extra": third} for word in (first, second)]
    return {**message, "content": parts}


def _words(index: int) -> list[str]:
    """Returns three words of a message, which no template holds; they have letters only, which few templates change."""
    number = "".join(chr(ord("a") + int(digit)) for digit in f"{index:05}")
    return [f"qzx{number}{end}" for end in ("v", "w", "k")]


def _form_in(prompt: str, places: Sequence[int], is_divided: bool) -> str | None:
    """Returns the form in which a prompt shows the words of some messages; None if it does not show them well."""
    shown = [[word in prompt for word in _words(i)] for i in places]
    if any(third for _, _, third in shown):
        return None
    if any(first and second for first, second, _ in shown):
        return "openai" if is_divided else "string"
    return "part" if is_divided and any(first for first, _, _ in shown) else None
