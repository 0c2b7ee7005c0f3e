"""Bodies of `/v1/responses`: `chat_body` says what such a body asks for in the fields of a chat.

The input of a response is a list of items: messages, and calls of functions with their outputs, which a chat has as
messages too. So everything after this module is the same for both endpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....engine.errors import unknown_key_message
from .fields import BOOLEAN, CONTENT, OBJECT, OBJECTS, TEXT, Kind
from .messages import read_parts
from .refusal import Refusal, check_kind

LOGPROBS = "message.output_text.logprobs"
"""Value of `include` that asks for log-probabilities."""

TEXT_TYPES = ("input_text", "output_text")
"""Types of the parts of a message or of a function's output."""

ITEM_ROLES = ("system", "developer", "user", "assistant")

_KEPT_BY_OPENAI = {"id": TEXT, "status": TEXT, "type": TEXT}

ITEM_FIELDS: Mapping[str, Mapping[str, Kind]] = {
    "message": {"role": TEXT, "content": CONTENT, "phase": TEXT, **_KEPT_BY_OPENAI},
    "function_call": {"call_id": TEXT, "name": TEXT, "arguments": TEXT, **_KEPT_BY_OPENAI},
    "function_call_output": {"call_id": TEXT, "output": CONTENT, **_KEPT_BY_OPENAI},
    "reasoning": {"summary": OBJECTS, "content": OBJECTS, **_KEPT_BY_OPENAI},
}
"""Type of an item -> the fields that it may hold, with their types."""

REQUIRED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}

TOOL_FIELDS = {"type": TEXT, "name": TEXT, "description": TEXT, "parameters": OBJECT, "strict": BOOLEAN}

REASONING_OFF = {"summary": ("auto",), "generate_summary": ("auto",), "context": ("auto",), "mode": ("standard",)}
"""Field of `reasoning` beside `effort` -> the values that ask for nothing."""


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the body of a request to `/v1/responses` with its input, tools and reasoning in the fields of a chat.

    Args:
        body: The body, whose fields were checked to have the right types.

    Raises:
        Refusal: There is no input, or an item, a tool or another value cannot be used.
    """
    if "input" not in body:
        raise Refusal("missing_required_parameter", "input is missing", "input")
    asked: dict[str, Any] = {**body, "messages": _messages(body)}
    if "tools" in body:
        asked["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body["tools"])]
    if "tool_choice" in body:
        asked["tool_choice"] = _tool_choice(body["tool_choice"])
    if (effort := _effort(body.get("reasoning", {}))) is not None:
        asked["reasoning_effort"] = effort
    return asked


def num_top_logprobs(body: Mapping[str, Any]) -> int | None:
    """Returns the number of likely tokens to report beside each token; None for no log-probabilities.

    Args:
        body: The body, whose fields were checked to have the right types.

    Raises:
        Refusal: `include` names something that there is not.
    """
    for name in body.get("include", ()):
        if name != LOGPROBS:
            raise Refusal("unsupported_value", f"include holds {name!r:.80}; only {LOGPROBS!r} is supported", "include")
    num = body.get("top_logprobs", 0)
    return num if num or body.get("include") else None


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = body["input"]
    messages: list[dict[str, Any]] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not given:
        raise Refusal("invalid_value", "input is empty; it must hold at least one item", "input")
    for index, item in enumerate(given):
        kind, fields = _checked_item(item, f"input[{index}]")
        _add(messages, kind, fields, f"input[{index}]")
    for message in messages:
        if not message.get("tool_calls"):
            message.setdefault("content", "")
    return messages


def _checked_item(item: Mapping[str, Any], place: str) -> tuple[str, dict[str, Any]]:
    """Returns the type of an item and its fields without those that are null."""
    kind = item.get("type") or ("message" if "role" in item else None)
    if not isinstance(kind, str) or kind not in ITEM_FIELDS:
        message = f"{place} is of type {kind!r:.80}; supported are {', '.join(ITEM_FIELDS)}"
        raise Refusal("unsupported_value" if isinstance(kind, str) else "invalid_type", message, f"{place}.type")
    given = {name: value for name, value in item.items() if value is not None}
    for name, value in given.items():
        if name == "encrypted_content":
            raise Refusal(
                "unsupported_value", f"{place} is encrypted for OpenAI; leave the item out", f"{place}.{name}"
            )
        if name not in ITEM_FIELDS[kind]:
            message = unknown_key_message(place, name, ITEM_FIELDS[kind])
            raise Refusal("unknown_parameter", message, f"{place}.{name}")
        check_kind(value, ITEM_FIELDS[kind][name], f"{place}.{name}")
    for name in REQUIRED[kind]:
        if name not in given:
            raise Refusal("missing_required_parameter", f"{place}.{name} is missing", f"{place}.{name}")
    return kind, given


def _add(messages: list[dict[str, Any]], kind: str, item: Mapping[str, Any], place: str) -> None:
    """Adds an item to the messages of a chat."""
    if kind == "reasoning":
        texts = [part["text"] for part in read_parts(item.get("content", ()), f"{place}.content", ("reasoning_text",))]
        turn = _turn(messages, begins=True)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + "".join(texts)
    elif kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        _turn(messages, begins=False).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        content = _content(item["output"], f"{place}.output")
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
    elif item["role"] not in ITEM_ROLES:
        message = f"{place}.role must be {', '.join(ITEM_ROLES)}; got {item['role']!r:.80}"
        raise Refusal("invalid_value", message, f"{place}.role")
    else:
        content = _content(item["content"], f"{place}.content")
        if item["role"] == "assistant":
            _turn(messages, begins=True)["content"] = content
        else:
            messages.append({"role": item["role"], "content": content})


def _turn(messages: list[dict[str, Any]], begins: bool) -> dict[str, Any]:
    """Returns the message of the assistant that an item belongs to: its reasoning, its text and its calls are one turn.

    Args:
        messages: The messages until now; the function may add one.
        begins: Whether the item comes before the calls, and the text, of its turn.
    """
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or (begins and last.keys() & {"content", "tool_calls"}):
        messages.append({"role": "assistant"})
    return messages[-1]


def _content(given: str | list[Any], place: str) -> str | list[dict[str, str]]:
    return given if isinstance(given, str) else read_parts(given, place, TEXT_TYPES)


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns a tool in the form of a chat, which has the function in an object of its own."""
    if tool.get("type") != "function":
        message = f"{place} is of type {tool.get('type')!r:.80}; only 'function' is supported"
        raise Refusal("unsupported_value", message, f"{place}.type")
    given = {name: value for name, value in tool.items() if value is not None and value is not False}
    for name, value in given.items():
        if name not in TOOL_FIELDS:
            raise Refusal("unknown_parameter", unknown_key_message(place, name, TOOL_FIELDS), f"{place}.{name}")
        check_kind(value, TOOL_FIELDS[name], f"{place}.{name}")
    if not given.get("name"):
        raise Refusal("missing_required_parameter", f"{place}.name is missing", f"{place}.name")
    return {"type": "function", "function": {name: value for name, value in given.items() if name != "type"}}


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        message = f"tool_choice as an object must be {{'type': 'function', 'name': ...}}; got {choice!r:.80}"
        raise Refusal("unsupported_value", message, "tool_choice")
    return {"type": "function", "function": {"name": choice["name"]}}


def _effort(reasoning: Mapping[str, Any]) -> str | None:
    for name, value in reasoning.items():
        if name != "effort" and name not in REASONING_OFF:
            message = unknown_key_message("reasoning", name, ["effort", *REASONING_OFF])
            raise Refusal("unknown_parameter", message, f"reasoning.{name}")
        if name != "effort" and value is not None and value not in REASONING_OFF[name]:
            message = f"reasoning.{name}={value!r:.80} is not supported; leave it out"
            raise Refusal("unsupported_value", message, f"reasoning.{name}")
    if reasoning.get("effort") is not None:
        check_kind(reasoning["effort"], TEXT, "reasoning.effort")
    return reasoning.get("effort")
