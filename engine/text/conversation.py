"""Conversations in the form in which chat templates read them: `check_messages`, `find_content_forms`, `as_read`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ..errors import ChatTemplateError, quote

__all__ = ["CONTENT_FORMATS", "ContentFormat", "Messages", "as_read", "check_messages", "find_content_forms"]

ContentFormat = Literal["auto", "string", "openai"]
"""The form of a message's content: ``"string"`` is one text, ``"openai"`` a list of parts ``{"type": "text", ...}``."""

CONTENT_FORMATS = ("auto", "string", "openai")

Messages = Sequence[Mapping[str, Any]]

TEXT, EXTRA = "millrace-text", "millrace-extra"
"""Words of the conversations with which a template is tried. A template that prints whole parts prints `EXTRA` too."""


def check_messages(messages: Any) -> None:
    """Checks that a conversation is a list of messages with a role and a content of text.

    Raises:
        ChatTemplateError: It is something else; the message names the first wrong message.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError(
            f"messages must be a non-empty list of {{'role': ..., 'content': ...}}; got {quote(messages, 80)}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(
                f"message {index} must be a dict with 'role' and 'content'; got {quote(message, 80)}"
            )
        _check_content(index, message.get("content"))


def _check_content(index: int, content: Any) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ChatTemplateError(
            f"the content of message {index} must be a text, a list of text parts or None; got {quote(content, 80)}"
        )
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatTemplateError(f"this release takes text only; a message holds the part {quote(part, 80)}")


def find_content_forms(render: Callable[[list[dict[str, Any]]], str]) -> frozenset[str]:
    """Finds out which forms of a message's content a template reads, by rendering a message in each form.

    Args:
        render: Function that renders a conversation with the template.

    Returns:
        The forms whose text appears in the prompt: ``"string"``, ``"openai"`` or both; ``"string"`` if there is none.
    """
    contents = {"string": TEXT, "openai": [{"type": "text", "text": TEXT, "extra": EXTRA}]}
    found = set()
    for form, content in contents.items():
        try:
            prompt = render([{"role": "user", "content": content}])
        except Exception:  # noqa: BLE001  # A template may raise any error for a form that it does not read.
            continue
        if TEXT in prompt and EXTRA not in prompt:
            found.add(form)
    return frozenset(found or {"string"})


def as_read(messages: Messages, forms: frozenset[str]) -> list[dict[str, Any]]:
    """Returns a conversation whose contents and tool calls have the form that a template reads.

    Args:
        messages: Checked conversation, which is not changed.
        forms: Forms of contents that the template reads. A content in another form is converted: parts are joined with
            line breaks, and a text becomes a list of one part.
    """
    return [_as_read(message, forms) for message in messages]


def _as_read(message: Mapping[str, Any], forms: frozenset[str]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        if "string" not in forms:
            content = [{"type": "text", "text": content}]
    elif content is None:
        content = None if "string" in forms else []
    elif "openai" not in forms:
        content = "\n".join(part["text"] for part in content)
    plain = {**message, "content": content}
    if isinstance(calls := message.get("tool_calls"), Sequence):
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return plain


def _with_parsed_arguments(call: Any) -> Any:
    """Returns a tool call whose arguments, which OpenAI's API has as JSON text, are a dictionary, as templates expect.

    Text that is no JSON object, e.g. because an earlier output was cut off, stays text.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"].strip() or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
