"""Constraints on the form of an answer: `read_constraint` reads `response_format`, `text.format` and others.

A body can force tool calls with `tool_choice`. The answer is then constrained to a JSON list of calls, whatever the
model's own format of calls is, and is parsed as such a list (`tool_calls.JSON_LIST`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....engine import StructuredOutputsParams
from ....engine.errors import SamplingParamsError, unknown_key_message
from .fields import BOOLEAN, OBJECT, TEXT
from .refusal import Refusal, check_kind

SCHEMA_FIELDS = {"name": TEXT, "description": TEXT, "schema": OBJECT, "strict": BOOLEAN}
"""Fields of a `json_schema`. An answer follows the schema whether `strict` is true or false."""

DEFINITIONS = ("$defs", "definitions")
"""Keywords of a schema whose definitions are referred to by a path from the root of the schema."""


def read_constraint(body: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """Returns the constraint that the answer of a body must meet; None for free text.

    Args:
        body: The body of a request, with tools that `read_tools` accepted.

    Raises:
        Refusal: The constraint is invalid or not supported, or the body sets more than one.
    """
    read = {"response_format": _format, "text": _text_format, "structured_outputs": _own, "tool_choice": _calls}
    found = {name: asked for name, reader in read.items() if name in body and (asked := reader(body)) is not None}
    if len(found) > 1:
        raise Refusal("invalid_value", f"{' and '.join(found)} both say what the answer is; keep one", [*found][-1])
    for name, asked in found.items():
        try:
            return StructuredOutputsParams.from_dict(asked)
        except SamplingParamsError as error:
            raise Refusal("invalid_value", str(error), name) from None
    return None


def is_forced(body: Mapping[str, Any]) -> bool:
    """Returns whether the `tool_choice` of a body forces the answer to be tool calls and nothing else."""
    return body.get("tool_choice", "auto") not in ("auto", "none")


def _own(body: Mapping[str, Any]) -> Mapping[str, Any]:
    return body["structured_outputs"]


def _format(body: Mapping[str, Any]) -> dict[str, Any] | None:
    asked, place = body["response_format"], "response_format"
    if _kind_of(asked, place) == "json_schema":
        check_kind(asked.get("json_schema"), OBJECT, f"{place}.json_schema")
        return _schema(asked["json_schema"], f"{place}.json_schema")
    return None if asked["type"] == "text" else {"json_object": True}


def _text_format(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Reads the field `text` of a response, where the fields of a schema stand in the format itself."""
    for name, value in body["text"].items():
        if name not in ("format", "verbosity"):
            raise Refusal(
                "unknown_parameter", unknown_key_message("text", name, ("format", "verbosity")), f"text.{name}"
            )
        if name == "verbosity" and value not in (None, "medium"):
            message = f"text.verbosity={value!r:.80} is not supported: ask for it in the prompt"
            raise Refusal("unsupported_value", message, "text.verbosity")
    asked, place = body["text"].get("format"), "text.format"
    if asked is None:
        return None
    check_kind(asked, OBJECT, place)
    if _kind_of(asked, place) == "json_schema":
        return _schema({name: value for name, value in asked.items() if name != "type"}, place)
    return None if asked["type"] == "text" else {"json_object": True}


def _kind_of(asked: Mapping[str, Any], place: str) -> str:
    kind = asked.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        message = f"{place}.type must be 'text', 'json_object' or 'json_schema'; got {kind!r:.80}"
        raise Refusal("unsupported_value", message, f"{place}.type")
    return kind


def _schema(fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if name not in SCHEMA_FIELDS:
            raise Refusal("unknown_parameter", unknown_key_message(place, name, SCHEMA_FIELDS), f"{place}.{name}")
        check_kind(value, SCHEMA_FIELDS[name], f"{place}.{name}")
    if "schema" not in given:
        raise Refusal("missing_required_parameter", f"{place}.schema is missing", f"{place}.schema")
    return {"json": given["schema"]}


def _calls(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the constraint ``{"json": schema of a list of tool calls}``; None if the body does not force calls."""
    if not is_forced(body):
        return None
    choice, tools = body["tool_choice"], [tool["function"] for tool in body.get("tools", ())]
    limits = {"minItems": 1}
    if body.get("parallel_tool_calls") is False:
        limits["maxItems"] = 1
    if choice != "required":
        named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = named.get("name") if isinstance(named, dict) else None
        tools = [tool for tool in tools if tool["name"] == name]
        limits = {"minItems": 1, "maxItems": 1}
    if not tools:
        known = ", ".join(repr(tool["function"]["name"]) for tool in body.get("tools", ())) or "none"
        shape = "'auto', 'none', 'required' or an object of type 'function' with the name of one of the tools"
        raise Refusal("invalid_value", f"tool_choice must be {shape} ({known}); got {choice!r:.80}", "tool_choice")
    definitions = _definitions(tools)
    return {"json": {"type": "array", "items": {"anyOf": [_call(tool) for tool in tools]}, **limits, **definitions}}


def _call(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = _parameters(tool)
    parameters = {name: value for name, value in schema.items() if name not in DEFINITIONS}
    return {
        "type": "object",
        "properties": {"name": {"const": tool["name"]}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = tool.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    check_kind(schema, OBJECT, "tools.function.parameters")
    return schema


def _definitions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the `$defs` and `definitions` of the tools' schemas, to put them at the root of the schema of all calls.

    A `$ref` such as `#/$defs/name` is looked up at the root. The function raises `Refusal` if two tools define a name
    in different ways.
    """
    merged: dict[str, dict[str, Any]] = {}
    for tool in tools:
        schema = _parameters(tool)
        for keyword in DEFINITIONS:
            check_kind(schema.get(keyword, {}), OBJECT, f"tools.function.parameters.{keyword}")
            for name, definition in schema.get(keyword, {}).items():
                if merged.setdefault(keyword, {}).setdefault(name, definition) != definition:
                    message = f"tools define {name!r} in different ways, and a forced call takes one; rename it"
                    raise Refusal("unsupported_value", message, "tools")
    return merged
