"""Reads the messages, tools and template variables of a chat body, in the form that chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....engine.errors import unknown_key_message
from .fields import MESSAGE_FIELDS, NOT_SHOWN, REFUSED_IN_MESSAGES, ROLES, TEXT
from .refusal import Refusal, check_kind

TEMPLATE_FIELDS = ("reasoning_effort", "add_generation_prompt", "continue_final_message")
"""Fields of a body that become variables of the chat template."""

NO_VARIABLES = ("chat_template", "conversation", "messages", "padding", "tokenize", "tools", "truncation")
"""Names that `chat_template_kwargs` may not set, because the caller of the template sets them."""


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checks the messages of a chat body, and returns them in the form that chat templates expect.

    Args:
        messages: The `messages` of the body.

    Returns:
        The messages without null fields. The role `developer` becomes `system`, the name that templates know.

    Raises:
        Refusal: There is no message, or one is malformed or holds a part that is not text.
    """
    if not messages:
        raise Refusal("invalid_value", "messages is empty; it must hold at least one message", "messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def read_tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the tools that the chat template shows to the model; None if there are none or `tool_choice` is "none".

    Args:
        body: The body of a chat request.

    Raises:
        Refusal: A tool is not a function with a name.
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
    """Returns name -> value of the variables that a body sets for the chat template; None if the body sets none.

    Args:
        body: The body of a chat request whose messages were checked.

    Raises:
        Refusal: A name in `chat_template_kwargs` is reserved for the caller of the template.
    """
    variables = dict(body.get("chat_template_kwargs", {}))
    for name in variables:
        if name in NO_VARIABLES:
            place = f"chat_template_kwargs.{name}"
            raise Refusal("unsupported_value", f"{place} is not a variable of the template; leave it out", place)
    variables.update({name: body[name] for name in TEMPLATE_FIELDS if name in body})
    if body["messages"][-1]["role"] == "assistant":
        # OpenAI's service answers with a new message; by default, our stage would continue the last message.
        variables.setdefault("continue_final_message", False)
    return variables or None


def _read_message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    given = {name: value for name, value in message.items() if value is not None}
    for name, value in given.items():
        if name in REFUSED_IN_MESSAGES:
            raise Refusal("unsupported_value", f"{place}.{name}: {REFUSED_IN_MESSAGES[name]}", f"{place}.{name}")
        if name not in MESSAGE_FIELDS:
            raise Refusal("unknown_parameter", unknown_key_message(place, name, MESSAGE_FIELDS), f"{place}.{name}")
        check_kind(value, MESSAGE_FIELDS[name], f"{place}.{name}")
    role = given.get("role")
    if role not in ROLES:
        raise Refusal("invalid_value", f"{place}.role must be {', '.join(ROLES)}; got {role!r:.80}", f"{place}.role")
    shown = {name: value for name, value in given.items() if name not in NOT_SHOWN}
    if role == "assistant":
        shown = _assistant_turn(shown, has_content="content" in message)
    if "content" not in shown and not shown.get("tool_calls"):
        raise Refusal("missing_required_parameter", f"{place}.content is missing", f"{place}.content")
    if isinstance(shown.get("content"), list):
        shown["content"] = read_parts(shown["content"], f"{place}.content")
    for call in shown.get("tool_calls", ()):
        _check_call(call, f"{place}.tool_calls")
    return {**shown, "role": "system" if role == "developer" else role}


def _assistant_turn(given: Mapping[str, Any], has_content: bool) -> dict[str, Any]:
    """Returns a message of the assistant as templates read it, although OpenAI's service may have written it.

    A refusal is a turn's text in a field that no template reads. A turn whose content is null, without calls, is empty.
    """
    shown = {name: value for name, value in given.items() if name != "tool_calls" or value}
    if "content" not in shown and "refusal" in shown:
        shown["content"] = shown.pop("refusal")
    if "content" not in shown and "tool_calls" not in shown and has_content:
        shown["content"] = ""
    return shown


def read_parts(parts: Sequence[Any], place: str, text_types: Sequence[str] = ("text",)) -> list[dict[str, str]]:
    """Checks the parts of a content, and returns them in the form that chat templates expect.

    Args:
        parts: The list of parts.
        place: Path of the list in the body, for error messages.
        text_types: The types of parts whose text is in the field `text`. Parts of type `refusal` may stand beside them.

    Raises:
        Refusal: A part is malformed or not a text.
    """
    read = []
    for index, part in enumerate(parts):
        here = f"{place}[{index}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise Refusal("invalid_type", f"{here} must be an object with a type; got {part!r:.80}", here)
        if part["type"] not in (*text_types, "refusal"):
            message = f"{here} is of type {part['type']!r:.80}; only text is supported ({', '.join(text_types)})"
            raise Refusal("unsupported_value", message, here)
        name = "refusal" if part["type"] == "refusal" else "text"
        check_kind(part.get(name), TEXT, f"{here}.{name}")
        read.append(part if part["type"] == "text" else {"type": "text", "text": part[name]})
    return read


def _check_call(call: Mapping[str, Any], place: str) -> None:
    function = call.get("function")
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise Refusal("invalid_value", f"{place} must hold calls of functions by name; got {call!r:.80}", place)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
