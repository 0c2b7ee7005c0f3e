"""Lines for `/v1/responses`: what the model is shown of them, and answers read with the types of OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response

from millrace.engine import SamplingParams
from millrace.pipeline.openai_batch.lines.fields import RESPONSES
from millrace.pipeline.openai_batch.lines.line_error import LineError
from millrace.pipeline.openai_batch.lines.request import BatchRequest, RequestReader
from millrace.pipeline.openai_batch.lines.response import answer_line

READER = RequestReader(("m",), {"temperature": 0.5})
TOOL = {"type": "function", "name": "f", "description": None, "parameters": {"type": "object"}, "strict": True}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "f", "arguments": "{}", "status": "completed"}
RESULT = {"type": "function_call_output", "call_id": "1", "output": "3"}
CHAT_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def line(**body: Any) -> bytes:
    asked = {"model": "m", "input": "hi", **body}
    return json.dumps({"custom_id": "a", "method": "POST", "url": RESPONSES, "body": asked}).encode()


def request(**body: Any) -> BatchRequest:
    read = READER.read(line(**body))
    assert isinstance(read, BatchRequest), read
    return read


def shown(*items: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    return request(input=list(items), **body).prompt["messages"]


def test_a_text_is_a_users_message_after_the_instructions() -> None:
    read = request(instructions="be brief", max_output_tokens=7, top_p=0.5, store=True, metadata={"k": "v"}, seed=3)
    assert read.prompt["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert read.sampling == SamplingParams(max_tokens=7, top_p=0.5, seed=3, temperature=0.5)
    assert request().sampling.max_tokens is None


def test_items_are_messages_with_parts_of_text() -> None:
    assert shown(
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}], "status": "completed"},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "yes", "annotations": [], "logprobs": []},
            {"type": "refusal", "refusal": "no"},
        ]},
    ) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}, {"type": "text", "text": "no"}]},
    ]  # fmt: skip


def test_reasoning_text_and_calls_are_one_turn_and_outputs_answer_it() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"role": "assistant", "content": "I look."}
    parts = {**RESULT, "output": [{"type": "input_text", "text": "4"}]}
    assert shown(thought, said, CALL, {**CALL, "call_id": "2"}, RESULT, parts, CALL, RESULT) == [
        {"role": "assistant", "reasoning_content": "hm", "content": "I look.",
         "tool_calls": [CHAT_CALL, {**CHAT_CALL, "id": "2"}]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]},
        {"role": "assistant", "tool_calls": [CHAT_CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]  # fmt: skip
    assert shown(said, thought) == [said, {"role": "assistant", "reasoning_content": "hm", "content": ""}]


def test_tools_and_effort_reach_the_template_as_those_of_a_chat() -> None:
    read = request(tools=[TOOL], reasoning={"effort": "low", "summary": "auto"}, parallel_tool_calls=False)
    function = {"name": "f", "parameters": {"type": "object"}, "strict": True}
    assert read.prompt["tools"] == [{"type": "function", "function": function}]
    assert read.prompt["chat_template_kwargs"] == {"reasoning_effort": "low"}
    assert (read.max_tool_calls, read.is_forced) == (1, False)
    assert request(tools=[TOOL], tool_choice="none").prompt["tools"] is None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "f"}])
def test_a_call_can_be_forced(choice: Any) -> None:
    read = request(tools=[TOOL], tool_choice=choice)
    assert read.is_forced and read.sampling.structured_outputs is not None


@pytest.mark.parametrize(
    ("text", "json_text"),
    [
        ({"format": {"type": "text"}, "verbosity": "medium"}, None),
        ({"format": {"type": "json_object"}}, None),
        ({"format": {"type": "json_schema", "name": "n", "strict": None, "schema": {"enum": [1]}}}, '{"enum": [1]}'),
    ],
)
def test_the_format_of_the_text_is_a_constraint(text: dict[str, Any], json_text: str | None) -> None:
    asked = request(text=text).sampling.structured_outputs
    assert (asked is None) == (text["format"]["type"] == "text")
    assert (asked and asked.json) == json_text


@pytest.mark.parametrize(
    ("body", "num"),
    [
        ({}, None),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, 2),
        ({"top_logprobs": 2}, 2),
        ({"top_logprobs": 0, "include": []}, None),
    ],
)
def test_log_probabilities_are_asked_for(body: dict[str, Any], num: int | None) -> None:
    read = request(**body)
    assert (read.num_top, read.sampling.logprobs) == (num, num)


WRONG: list[tuple[dict[str, Any], str, str, str]] = [
    ({"input": None}, "missing_required_parameter", "input", "input is missing"),
    ({"input": []}, "invalid_value", "input", "input is empty"),
    ({"input": [[]]}, "invalid_type", "input", "a list of items"),
    ({"input": [{}]}, "invalid_type", "input[0].type", "supported are message"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_value", "input[0].type", "'item_reference'"),
    ({"input": [{"role": "robot", "content": "x"}]}, "invalid_value", "input[0].role", "got 'robot'"),
    ({"input": [{"role": "user"}]}, "missing_required_parameter", "input[0].content", "missing"),
    ({"input": [{"role": "user", "content": "x", "nam": 1}]}, "unknown_parameter", "input[0].nam", "'nam'"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "unsupported_value", "input[0].content[0]",
     "only text"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "unsupported_value",
     "input[0].encrypted_content", "leave the item out"),
    ({"input": [{**CALL, "arguments": {}}]}, "invalid_type", "input[0].arguments", "a string"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_value", "tools[0].type", "only 'function'"),
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name", "missing"),
    ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "unsupported_value", "tool_choice", "'type': 'function'"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "invalid_value", "tool_choice", "('f')"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "missing_required_parameter", "text.format.schema",
     "missing"),
    ({"text": {"format": {"type": "xml"}}}, "unsupported_value", "text.format.type", "json_schema"),
    ({"text": {"verbosity": "low"}}, "unsupported_value", "text.verbosity", "in the prompt"),
    ({"reasoning": {"summary": "detailed"}}, "unsupported_value", "reasoning.summary", "leave it out"),
    ({"reasoning": {"efort": "low"}}, "unknown_parameter", "reasoning.efort", "did you mean 'effort'?"),
    ({"include": ["file_search_call.results"]}, "unsupported_value", "include", "only 'message.output_text.logprobs'"),
    ({"previous_response_id": "resp_1"}, "unsupported_value", "previous_response_id", "whole conversation into input"),
    ({"conversation": "conv_1"}, "unsupported_value", "conversation", "whole conversation into input"),
    ({"truncation": "auto"}, "unsupported_value", "truncation", "not truncated"),
    ({"max_tokens": 5}, "unsupported_value", "max_tokens", "use max_output_tokens"),
    ({"messages": []}, "unsupported_value", "messages", "use input"),
    ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens", "0"),
    ({"metadata": {"k": 1}}, "invalid_type", "metadata", "an object of strings"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "param", "said"), WRONG, ids=[f"{one[2]}-{one[1]}" for one in WRONG])
def test_what_cannot_be_heeded_is_refused_by_name(body: dict[str, Any], code: str, param: str, said: str) -> None:
    found = READER.read(line(**body))
    assert isinstance(found, LineError)
    assert (found.code, found.param, found.custom_id) == (code, param, "a")
    assert said in found.message


def answer(row: dict[str, Any] | None = None, **body: Any) -> Response:
    usual = {
        "generated_text": "yes", "generated_tokens": [3], "finish_reason": "stop", "stop_reason": None,
        "logprobs": None, "outputs": None, "num_input_tokens": 4, "num_cached_tokens": 1, "num_generated_tokens": 3,
    }  # fmt: skip
    read = json.loads(answer_line(request(**body), {**usual, **(row or {})}, 1_700_000_000, "fp_1"))
    assert (read["custom_id"], read["error"], read["response"]["status_code"]) == ("a", None, 200)
    return Response.model_validate(read["response"]["body"], strict=True)


def test_an_answer_is_a_response() -> None:
    read = answer(instructions="be brief", metadata={"k": "v"}, temperature=0, max_output_tokens=9, tools=[TOOL])
    assert (read.object, read.model, read.status, read.output_text) == ("response", "m", "completed", "yes")
    assert (read.instructions, read.metadata, read.temperature) == ("be brief", {"k": "v"}, 0)
    assert (read.max_output_tokens, read.tools[0].name, read.incomplete_details) == (9, "f", None)
    assert read.usage is not None
    assert (read.usage.input_tokens, read.usage.output_tokens, read.usage.total_tokens) == (4, 3, 7)
    assert read.usage.input_tokens_details.cached_tokens == 1


def test_an_answer_that_was_cut_off_is_incomplete() -> None:
    read = answer({"finish_reason": "length"})
    assert read.incomplete_details is not None
    assert (read.status, read.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert read.output[0].status == "incomplete"


def test_reasoning_and_calls_are_items_that_can_be_sent_back() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    read = answer({"reasoning_content": "hm", "content": None, "tool_calls": [call]}, tools=[TOOL])
    assert [one.type for one in read.output] == ["reasoning", "function_call"]
    dumped = [one.model_dump() for one in read.output]
    assert shown({"role": "user", "content": "hi"}, *dumped)[1] == {
        "role": "assistant", "reasoning_content": "hm", "tool_calls": [call],
    }  # fmt: skip
    said = answer().output[0].model_dump()
    assert shown(said) == [{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]


def test_a_forced_call_is_a_call() -> None:
    text = '[{"name": "f", "parameters": {}}]'
    read = answer({"generated_text": text}, tools=[TOOL], tool_choice="required")
    assert [(one.type, one.name, one.arguments) for one in read.output] == [("function_call", "f", "{}")]


def test_log_probabilities_stand_beside_the_text() -> None:
    drawn = {"decoded_token": "yes", "logprob": -0.5, "rank": 1}
    broken = {"decoded_token": "\ufffd", "logprob": -2.0, "rank": 2}
    (message,) = answer({"logprobs": [{3: drawn, 4: broken}], "finish_reason": "length"}, top_logprobs=2).output
    (token,) = message.content[0].logprobs
    assert (token.token, token.logprob, token.bytes) == ("yes", -0.5, [121, 101, 115])
    assert [(one.token, one.bytes) for one in token.top_logprobs] == [("yes", [121, 101, 115]), ("\ufffd", [])]
