"""Lines of batch files: what is a request, and what is said of a line that is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage

from millrace.engine import SamplingParams
from millrace.pipeline.openai_batch.lines.fields import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    FIELDS,
    FIELDS_OF,
    RESPONSES,
    TEXT_ENDPOINTS,
)
from millrace.pipeline.openai_batch.lines.line_error import LineError
from millrace.pipeline.openai_batch.lines.request import BatchRequest, RequestReader
from millrace.pipeline.stages.adapters import AdapterNames

READER = RequestReader(("m", "gpt-4o"), {"temperature": 0.5})
HI = [{"role": "user", "content": "hi"}]
PROMPTS = {CHAT: {"messages": HI}, COMPLETIONS: {"prompt": "once"}, RESPONSES: {"input": "hi"}, EMBEDDINGS: {}}


def line(url: str = CHAT, **body: Any) -> bytes:
    asked = PROMPTS[url]
    return json.dumps(
        {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", **asked, **body}}
    ).encode()


def request(url: str = CHAT, **body: Any) -> BatchRequest:
    read = READER.read(line(url, **body))
    assert isinstance(read, BatchRequest), read
    return read


def error(text: bytes) -> LineError:
    read = READER.read(text)
    assert isinstance(read, LineError), read
    return read


def test_a_chat_becomes_messages_and_parameters() -> None:
    read = request(max_completion_tokens=7, top_p=0.5, stop="x", logit_bias={"5": -1}, seed=3, user="me", store=None)
    assert (read.custom_id, read.url, read.model, read.num_top, read.echo) == ("a", CHAT, "m", None, False)
    assert read.prompt == {"messages": HI, "tools": None, "chat_template_kwargs": None}
    assert read.sampling == SamplingParams(
        max_tokens=7, top_p=0.5, stop=["x"], logit_bias={5: -1.0}, seed=3, temperature=0.5
    )


@pytest.mark.parametrize(
    ("adapters", "model", "adapter"),
    [
        (AdapterNames(("base",), {"legal": "org/legal"}), "legal", "legal"),
        (AdapterNames(("base",), {"legal": "org/legal"}), "m", None),
        (AdapterNames(("base",), {}, "s3://bucket/adapters"), "team/legal", "team/legal"),
        (AdapterNames(("base",), {}, "s3://bucket/adapters"), "gpt-4o", None),
    ],
)
def test_a_line_may_ask_for_an_adapter(adapters: AdapterNames, model: str, adapter: str | None) -> None:
    reader = RequestReader(("m", "gpt-4o"), adapters=adapters)
    for url in (CHAT, COMPLETIONS, RESPONSES):
        read = reader.read(line(url, model=model))
        assert isinstance(read, BatchRequest)
        assert (read.model, reader.adapter_of(read.model)) == (model, adapter)


@pytest.mark.parametrize("model", ["other", "org/legal", "../legal", "/etc", "s3://bucket/legal"])
def test_a_line_that_asks_for_no_adapter_of_the_batch_is_an_error(model: str) -> None:
    reader = RequestReader(("m",), adapters=AdapterNames(("base",), {"legal": "org/legal"}))
    read = reader.read(line(model=model))
    assert isinstance(read, LineError)
    assert (read.code, read.status, read.param) == ("model_not_found", 404, "model")
    assert f"model {model!r} is not served here, but 'm', 'legal'" in read.message


def test_equal_bodies_are_different_draws_and_the_same_again() -> None:
    seeds = [READER.read(line().replace(b'"a"', custom_id)).sampling.seed for custom_id in (b'"a"', b'"b"', b'"a"')]
    assert seeds[0] == seeds[2] != seeds[1]
    assert RequestReader(("m",), {"temperature": 0}).read(line()).sampling.seed is None


def test_a_body_wins_over_the_defaults_and_a_limit_is_the_endpoints() -> None:
    assert request(temperature=1.5).sampling.temperature == 1.5
    assert request().sampling.max_tokens is None
    assert request(COMPLETIONS).sampling.max_tokens == 16
    assert RequestReader(("m",), {"max_tokens": 5}).read(line()).sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "column", "value"),
    [
        ("once", "prompt", "once"),
        (["once"], "prompt", "once"),
        ([1, 2], "tokenized_prompt", [1, 2]),
        ([[1, 2]], "tokenized_prompt", [1, 2]),
    ],
)
def test_a_prompt_is_text_or_tokens(prompt: Any, column: str, value: Any) -> None:
    assert request(COMPLETIONS, prompt=prompt).prompt == {column: value}


def test_text_parts_a_developer_and_a_tool_call_are_messages() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be brief", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    read = request(messages=messages).prompt["messages"]
    assert read[0] == {"role": "system", "content": "be brief"}
    assert read[2] == {"role": "assistant", "tool_calls": [call]}


def test_tools_are_shown_unless_none_shall_be_called() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert request(tools=tools, tool_choice="auto").prompt["tools"] == tools
    assert request(tools=tools, tool_choice="none").prompt["tools"] is None


def test_variables_of_the_template_are_gathered() -> None:
    read = request(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert read.prompt["chat_template_kwargs"] == {"enable_thinking": False, "reasoning_effort": "low"}


def test_an_answer_to_the_assistants_turn_is_a_new_one_unless_it_shall_go_on() -> None:
    messages = [*HI, {"role": "assistant", "content": "We"}]
    assert request(messages=messages).prompt["chat_template_kwargs"] == {"continue_final_message": False}
    going_on = request(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert going_on.prompt["chat_template_kwargs"]["continue_final_message"] is True


def test_a_top_p_of_zero_keeps_one_token() -> None:
    assert request(top_p=0).sampling.top_p == request(COMPLETIONS, top_p=0.0).sampling.top_p == 1e-6
    assert error(line(top_p=-0.1)).param == "top_p"


def test_an_answer_of_openais_service_can_be_sent_back_as_it_was_dumped() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Par'}}
    dumped = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [{"type": "url_citation"}],
        "audio": None, "function_call": None, "tool_calls": [call],
    }  # fmt: skip
    read = request(messages=[*HI, dumped, *HI])
    assert read.prompt["messages"][1] == {"role": "assistant", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"refusal": "I cannot."}, "I cannot."),
        ({"tool_calls": []}, ""),
        ({"content": "Yes.", "tool_calls": []}, "Yes."),
    ],
)
def test_a_refusal_and_an_empty_answer_are_turns_of_the_assistant(fields: dict[str, Any], content: Any) -> None:
    dumped = ChatCompletionMessage.construct(role="assistant", annotations=[], **fields).model_dump()
    assert {"audio", "function_call", "tool_calls", "refusal", "content"} <= set(dumped)
    assert request(messages=[*HI, dumped, *HI]).prompt["messages"][1] == {"role": "assistant", "content": content}


def test_a_part_that_is_a_refusal_is_text() -> None:
    turn = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert request(messages=[turn]).prompt["messages"][0]["content"] == [{"type": "text", "text": "No."}]


@pytest.mark.parametrize(("value", "most"), [(True, None), (False, 1), (None, None)])
def test_one_tool_call_at_a_time_can_be_asked_for(value: bool | None, most: int | None) -> None:
    assert request(parallel_tool_calls=value).max_tool_calls == most


@pytest.mark.parametrize(
    ("url", "body", "num_top", "logprobs"),
    [
        (CHAT, {"logprobs": True}, 0, 0),
        (CHAT, {"logprobs": True, "top_logprobs": 3}, 3, 3),
        (CHAT, {"logprobs": False}, None, None),
        (COMPLETIONS, {"logprobs": 2}, 2, 2),
        (COMPLETIONS, {}, None, None),
    ],
)
def test_logprobs_are_asked_for_as_each_endpoint_does(
    url: str, body: dict[str, Any], num_top: int | None, logprobs: int | None
) -> None:
    read = request(url, **body)
    assert (read.num_top, read.sampling.logprobs) == (num_top, logprobs)


@pytest.mark.parametrize(
    ("text", "code", "param", "said"),
    [
        (b"{", "invalid_json_line", None, "not JSON"),
        (b"[1]", "invalid_json_line", None, "a JSON list, not an object"),
        (b'{"a": NaN}', "invalid_json_line", None, "not JSON"),
        (b'{"a": "\xff"}', "invalid_json_line", None, "not UTF-8: byte 0xff at 7"),
        (b'{"a": "\\ud800"}', "invalid_json_line", None, "not JSON"),
        (b"[" * 100_000, "invalid_json_line", None, "recursion"),
        (b"{}", "missing_required_parameter", "custom_id", "custom_id is missing"),
        (b'{"custom_id": 5}', "invalid_type", "custom_id", "must be a string; got 5"),
        (line().replace(b'"a"', b'""'), "invalid_value", "custom_id", "empty"),
        (line().replace(b"custom_id", b"customid"), "unknown_parameter", "customid", "did you mean 'custom_id'?"),
        (line().replace(b"POST", b"GET"), "invalid_method", "method", "must be 'POST'; got 'GET'"),
        (line().replace(b"completions", b"completion"), "invalid_url", "url", "/v1/chat/completions or"),
        (b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":[]}', "invalid_type", "body", "an object"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_request_says_why(text: bytes, code: str, param: str | None, said: str) -> None:
    found = error(text)
    assert (found.code, found.param, found.status) == (code, param, None)
    assert said in found.message


def chat_error(code: str, param: str | None, said: str, **body: Any) -> Any:
    return pytest.param(line(CHAT, **body), code, param, said, id=f"chat-{param}-{code}")


def text_error(code: str, param: str | None, said: str, **body: Any) -> Any:
    return pytest.param(line(COMPLETIONS, **body), code, param, said, id=f"text-{param}-{code}")


CALLED = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    ("text", "code", "param", "said"),
    [
        chat_error("unknown_parameter", "temprature", "did you mean 'temperature'?", temprature=1),
        chat_error("unknown_parameter", "prompt", "no field 'prompt'", prompt="x"),
        chat_error("unknown_parameter", "messages[0].text", "'text'", messages=[{"role": "user", "text": "x"}]),
        chat_error("invalid_type", "temperature", "must be a number; got 'warm'", temperature="warm"),
        chat_error("invalid_type", "stop", "a string or a list", stop=[["x"]]),
        chat_error("invalid_type", "temperature", "must be a number", temperature=10**400),
        chat_error("invalid_type", "messages", "a list of objects", messages="hi"),
        chat_error("invalid_value", "temperature", "from 0 to 2", temperature=9),
        chat_error("invalid_value", "max_completion_tokens", "differ", max_tokens=1, max_completion_tokens=2),
        chat_error("invalid_value", None, "n=2 with temperature=0", n=2, temperature=0),
        chat_error("invalid_value", "top_logprobs", "needs logprobs", top_logprobs=2),
        chat_error("invalid_value", "messages", "empty", messages=[]),
        chat_error("missing_required_parameter", "messages[0].content", "missing", messages=[{"role": "assistant"}]),
        chat_error("unsupported_value", "messages[0].function_call", "use tool_calls", messages=[CALLED]),
        chat_error("invalid_value", "messages[0].role", "got 'robot'", messages=[{"role": "robot", "content": "x"}]),
        chat_error("invalid_value", "tools[0]", "'function'", tools=[{"type": "custom"}]),
        chat_error("missing_required_parameter", "messages", "missing", messages=None),
        chat_error("missing_required_parameter", "messages[0].content", "missing", messages=[{"role": "user"}]),
        chat_error("missing_required_parameter", "model", "missing", model=None),
        chat_error("unsupported_value", "messages[0].content[0]", "'image_url'", messages=IMAGE),
        chat_error("unsupported_value", "stream", "not streamed", stream=True),
        chat_error("unsupported_value", "guided_json", "use structured_outputs", guided_json={}),
        chat_error("unsupported_value", "chat_template_kwargs.tokenize", "", chat_template_kwargs={"tokenize": True}),
        text_error("unsupported_value", "prompt", "2 prompts", prompt=["a", "b"]),
        text_error("unsupported_value", "suffix", "between a prompt and a suffix", suffix="x"),
        text_error("unsupported_value", "echo", "without logprobs", echo=True, logprobs=1),
        text_error("invalid_type", "prompt", "token ids", prompt=[1, 2.5]),
        text_error("missing_required_parameter", "prompt", "missing", prompt=None),
    ],
)
def test_a_body_that_cannot_be_run_says_why(text: bytes, code: str, param: str | None, said: str) -> None:
    found = error(text)
    assert (found.code, found.param, found.status, found.custom_id) == (code, param, 400, "a")
    assert said in found.message


def test_a_model_that_is_not_served_is_not_found() -> None:
    found = error(line(model="gpt-9"))
    assert (found.code, found.status) == ("model_not_found", 404)
    assert "'m', 'gpt-4o'" in found.message


def test_a_file_is_of_one_kind() -> None:
    found = error(line(EMBEDDINGS))
    assert found.code == "unsupported_endpoint" and "one of chats, completions and responses" in found.message
    found = RequestReader(("m",), task="embed").read(line())
    assert isinstance(found, LineError) and "one of embeddings" in found.message


@pytest.mark.parametrize("field", [one for one in FIELDS if one.use == "refused"], ids=lambda one: one.name)
def test_what_is_refused_may_be_off(field: Any) -> None:
    for value in (None, *field.off):
        assert isinstance(READER.read(line(field.endpoints[0], **{field.name: value})), BatchRequest)


def test_a_byte_order_mark_is_no_part_of_the_line() -> None:
    assert isinstance(READER.read(b"\xef\xbb\xbf" + line()), BatchRequest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_request_or_an_error(text: bytes) -> None:
    assert isinstance(READER.read(text), LineError)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    url = draw(st.sampled_from(TEXT_ENDPOINTS))
    values = JSON | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": JSON}))
    return url, draw(st.dictionaries(st.sampled_from(sorted(FIELDS_OF[url])), values, max_size=5))


@given(bodies())
def test_any_value_of_any_field_is_taken_or_refused(drawn: tuple[str, dict[str, Any]]) -> None:
    url, body = drawn
    assert isinstance(READER.read(line(url, **body)), BatchRequest | LineError)
