"""What a body asks of the form of its answer, and what becomes of calls that are forced."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from openai.types.chat import ChatCompletion

from millrace.engine.structured.grammar_text import check_compiles
from millrace.engine.structured.params import StructuredOutputsParams
from millrace.pipeline.openai_batch.lines.fields import CHAT, COMPLETIONS
from millrace.pipeline.openai_batch.lines.line_error import LineError
from millrace.pipeline.openai_batch.lines.request import BatchRequest, RequestReader
from millrace.pipeline.openai_batch.lines.response import answer_line

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
UNIT = {"enum": ["C", "F"]}
HAS_UNIT = {"type": "object", "properties": {"unit": {"$ref": "#/$defs/Unit"}}, "required": ["unit"]}
PLACE = {**HAS_UNIT, "$defs": {"Unit": UNIT}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}
TIME = {"type": "function", "function": {"name": "time"}}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"$defs": {"Unit": {}}}}}
WRONG = {"type": "function", "function": {"name": "wrong", "parameters": {"$defs": []}}}
CALL = {"name": "weather", "parameters": {"unit": "F"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
BOTH = {"tools": [WEATHER, TIME]}


def read(url: str = CHAT, **body: Any) -> BatchRequest | LineError:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if url == CHAT else {"prompt": "once"}
    line = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", **asked, **body}}
    return RequestReader(("m",)).read(json.dumps(line).encode())


def constraint(url: str = CHAT, **body: Any) -> StructuredOutputsParams | None:
    found = read(url, **body)
    assert isinstance(found, BatchRequest), found
    check_compiles(found.sampling.structured_outputs)
    return found.sampling.structured_outputs


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_a_format_is_a_constraint(url: str) -> None:
    strict = {"name": "answer", "schema": SCHEMA, "strict": True, "description": None}
    assert constraint(url, response_format={"type": "text"}) is None
    assert constraint(url, response_format={"type": "json_object"}) == StructuredOutputsParams(json_object=True)
    schema = constraint(url, response_format={"type": "json_schema", "json_schema": strict})
    assert schema == StructuredOutputsParams(json=SCHEMA)
    assert constraint(url, structured_outputs={"choice": ["a"]}) == StructuredOutputsParams(choice=["a"])


def test_a_forced_answer_has_one_call_where_the_body_asks_for_one() -> None:
    asked = constraint(**BOTH, tool_choice="required", parallel_tool_calls=False)
    assert asked is not None
    assert json.loads(asked.json)["maxItems"] == 1


@pytest.mark.parametrize(
    ("choice", "valid", "invalid"),
    [
        (
            "required",
            ['[{"name": "time", "parameters": {}}, {"name": "weather", "parameters": {"unit": "C"}}]'],
            ["[]", '[{"name": "hour", "parameters": {}}]', '[{"name": "weather", "parameters": {"unit": "K"}}]'],
        ),
        (
            NAMED,
            [json.dumps([CALL])],
            ['[{"name": "time", "parameters": {}}]', json.dumps([CALL] * 2)],
        ),
    ],
    ids=["required", "named"],
)
def test_forced_calls_are_a_list_under_a_schema(choice: Any, valid: list[str], invalid: list[str]) -> None:
    asked = constraint(**BOTH, tool_choice=choice)
    assert asked is not None
    checker = jsonschema.Draft202012Validator(json.loads(asked.json))
    assert all(checker.is_valid(json.loads(text)) for text in valid)
    assert not any(checker.is_valid(json.loads(text)) for text in invalid)


@pytest.mark.parametrize(
    ("body", "code", "param", "said"),
    [
        ({"response_format": {"type": "xml"}}, "unsupported_value", "response_format.type", "got 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "invalid_type", "response_format.json_schema", "an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "missing_required_parameter", "response_format.json_schema.schema", "missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"scheme": {}}}},
            "unknown_parameter", "response_format.json_schema.scheme", "did you mean 'schema'?",
        ),
        ({"structured_outputs": {"regexp": "a"}}, "invalid_value", "structured_outputs", "did you mean 'regex'?"),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs", "exactly one"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "invalid_value", "structured_outputs", "keep one",
        ),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice", "one of the tools (none)"),
        ({**BOTH, "tool_choice": "any"}, "invalid_value", "tool_choice", "('weather', 'time'); got 'any'"),
        ({**BOTH, "tool_choice": {"type": "function", "function": 3}}, "invalid_value", "tool_choice", "got {"),
        (
            {**BOTH, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "invalid_value", "tool_choice", "response_format and tool_choice",
        ),
        (
            {"tools": [WEATHER, OTHER], "tool_choice": "required"},
            "unsupported_value", "tools", "'Unit' in different ways",
        ),
        ({"tools": [WRONG], "tool_choice": "required"}, "invalid_type", "tools.function.parameters.$defs", "an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_named(body: dict[str, Any], code: str, param: str, said: str) -> None:
    found = read(**body)
    assert isinstance(found, LineError)
    assert (found.code, found.param, found.status) == (code, param, 400) and said in found.message


def answer(text: str, finish_reason: str = "stop", **body: Any) -> Any:
    request = read(**body)
    assert isinstance(request, BatchRequest)
    row = {
        "generated_text": text, "generated_tokens": [3], "finish_reason": finish_reason, "stop_reason": None,
        "logprobs": None, "outputs": None, "num_input_tokens": 4, "num_cached_tokens": 1, "num_generated_tokens": 3,
        "content": None, "reasoning_content": text, "tool_calls": [],
    }  # fmt: skip
    line = json.loads(answer_line(request, row, 1_700_000_000, "fp_1"))
    return ChatCompletion.model_validate(line["response"]["body"], strict=True).choices[0]


def test_forced_calls_are_read() -> None:
    text = '[{"name": "weather", "parameters": {"unit": "C"}}, {"name": "time", "parameters": {}}]'
    choice = answer(text, **BOTH, tool_choice="required")
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert [(one.function.name, json.loads(one.function.arguments)) for one in choice.message.tool_calls] == [
        ("weather", {"unit": "C"}),
        ("time", {}),
    ]
    assert len({one.id for one in choice.message.tool_calls}) == 2
    cut = answer(text[:30], "length", **BOTH, tool_choice="required")
    assert (cut.message.content, cut.message.tool_calls, cut.finish_reason) == (text[:30], None, "length")


def test_all_of_a_constrained_text_is_answer() -> None:
    """Though the stage for reasoning, which saw no mark, took it for that."""
    message = answer('{"a": 1}', response_format={"type": "json_object"}).message
    assert message.content == '{"a": 1}' and not message.model_extra
