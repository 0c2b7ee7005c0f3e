"""The conversation of a chat's body, and the tools that it may use, as chat templates expect them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....engine.errors import unknown_key_message
from .fields import MESSAGE_FIELDS, ROLES
from .refusal import Refusal, check_kind

TEMPLATE_FIELDS = ("reasoning_effort", "add_generation_prompt", "continue_final_message")
"""Fields of a body that are variables of the template."""

NO_VARIABLES = ("chat_template", "conversation", "messages", "padding", "tokenize", "tools", "truncation")
"""Names that belong to those who call the template."""


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checks a conversation.

    Args:
        messages: The objects of the body's list.

    Returns:
        The messages; the role `developer` has its older name, `system`, which templates know.

    Raises:
        Refusal: A message is not one, or holds more than text.
    """
    if not messages:
        raise Refusal("invalid_value", "messages is empty; it must hold at least one message", "messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def read_tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the tools that the template shows, None for none.

    Args:
        body: A chat's body.

    Raises:
        Refusal: A tool is no function.
    """
    tools = body.get("tools") or None
    for index, tool in enumerate(tools or ()):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not _is_name(function.get("name")):
            place = f"tools[{index}]"
            shape = "{'type': 'function', 'function': {'name': ...}}"
            raise Refusal("invalid_value", f"{place} must be {shape}; got {tool!r:.80}", place)
    return None if body.get("tool_choice") == "none" else tools


def read_template_kwargs(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the variables that a body gives the chat template, None for none.

    Args:
        body: A chat's body, whose messages were checked.

    Raises:
        Refusal: One of them is no variable.
    """
    variables = dict(body.get("chat_template_kwargs", {}))
    for name in variables:
        if name in NO_VARIABLES:
            place = f"chat_template_kwargs.{name}"
            raise Refusal("unsupported_value", f"{place} is not a variable of the template; leave it out", place)
    variables.update({name: body[name] for name in TEMPLATE_FIELDS if name in body})
    if body["messages"][-1]["role"] == "assistant":
        # The service answers with a message of its own; the stage by itself would go on with this one.
        variables.setdefault("continue_final_message", False)
    return variables or None


def _read_message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    given = {name: value for name, value in message.items() if value is not None}
    for name, value in given.items():
        if name not in MESSAGE_FIELDS:
            raise Refusal("unknown_parameter", unknown_key_message(place, name, MESSAGE_FIELDS), f"{place}.{name}")
        check_kind(value, MESSAGE_FIELDS[name], f"{place}.{name}")
    role = given.get("role")
    if role not in ROLES:
        raise Refusal("invalid_value", f"{place}.role must be {', '.join(ROLES)}; got {role!r:.80}", f"{place}.role")
    if "content" not in given and not (role == "assistant" and given.get("tool_calls")):
        raise Refusal("missing_required_parameter", f"{place}.content is missing", f"{place}.content")
    if isinstance(given.get("content"), list):
        _check_parts(given["content"], f"{place}.content")
    for call in given.get("tool_calls", ()):
        _check_call(call, f"{place}.tool_calls")
    return {**given, "role": "system" if role == "developer" else role}


def _check_parts(parts: Sequence[Any], place: str) -> None:
    for index, part in enumerate(parts):
        here = f"{place}[{index}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise Refusal("invalid_type", f"{here} must be an object with a type; got {part!r:.80}", here)
        if part["type"] != "text":
            message = f"{here} is of type {part['type']!r:.80}; text is all that can be read yet"
            raise Refusal("unsupported_value", message, here)
        if not isinstance(part.get("text"), str):
            raise Refusal("invalid_type", f"{here}.text must be a string; got {part.get('text')!r:.80}", f"{here}.text")


def _check_call(call: Mapping[str, Any], place: str) -> None:
    function = call.get("function")
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise Refusal("invalid_value", f"{place} must hold calls of functions by name; got {call!r:.80}", place)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
