"""Conversations in the form in which chat templates read them: `check_messages`, `as_read`, `plain_data`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, is_dataclass
from datetime import date, time
from decimal import Decimal
from enum import Enum
from typing import Any, Literal
from uuid import UUID

from ..errors import ChatTemplateError, quote
from .content_forms import Forms

__all__ = [
    "CONTENT_FORMATS",
    "ContentFormat",
    "Messages",
    "as_read",
    "check_messages",
    "plain_data",
]

ContentFormat = Literal["auto", "string", "openai"]
"""The form of a message's content: ``"string"`` is one text, ``"openai"`` a list of parts ``{"type": "text", ...}``."""

CONTENT_FORMATS = ("auto", "string", "openai")

Messages = Sequence[Mapping[str, Any]]


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


def as_read(messages: Messages, forms: Forms) -> list[dict[str, Any]]:
    """Returns a conversation whose contents and tool calls have the form that a template reads.

    Args:
        messages: Checked conversation, which is not changed.
        forms: Forms of contents that the template reads, of each role. A content in another form is converted: parts
            are joined with line breaks, and a text becomes a list of one part.
    """
    return [_as_read(message, forms.get(message["role"], frozenset({"string"}))) for message in messages]


def _as_read(message: Mapping[str, Any], forms: frozenset[str]) -> dict[str, Any]:
    plain = {**message, "content": _content_as_read(message.get("content"), forms)}
    if isinstance(calls := message.get("tool_calls"), Sequence):
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return plain


def _content_as_read(content: Any, forms: frozenset[str]) -> Any:
    if content is None:
        return None if "string" in forms else []
    if not isinstance(content, str):
        if "openai" in forms:
            return content
        content = "\n".join(part["text"] for part in content)
    return content if "string" in forms else [{"type": "text", "text": content}]


def plain_data(what: str, value: Any) -> Any:
    """Returns a value as JSON has it, e.g. a date as text and an array as a list.

    A template gets no other values: transformers would give it the name of their type.

    Args:
        what: Name of the value, for the error message.
        value: The value.

    Raises:
        ChatTemplateError: The value holds something that JSON has no form for.
    """
    try:
        return json.loads(json.dumps(value, default=_as_json))
    except Exception as error:  # The methods of an object can raise any error.
        raise ChatTemplateError(f"{what} must hold values that JSON has; {error!s:.200}; got {quote(value)}") from error


def _as_json(value: Any) -> Any:
    """Returns a value that JSON lacks as one that is nearer to JSON: an array of numpy or torch as a list, say."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence | Set):
        return list(value)
    raise TypeError(f"it holds a {type(value).__name__}")


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
