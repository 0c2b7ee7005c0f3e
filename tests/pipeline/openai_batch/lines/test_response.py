"""Answers and errors as lines, read with the types of OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import BatchError, Completion
from openai.types.chat import ChatCompletion

from millrace.engine import SamplingParams
from millrace.pipeline.openai_batch.lines.fields import CHAT, COMPLETIONS
from millrace.pipeline.openai_batch.lines.line_error import LineError, duplicate_error, error_of_run
from millrace.pipeline.openai_batch.lines.request import BatchRequest
from millrace.pipeline.openai_batch.lines.response import answer_line, error_line

EOS = 9


def token(text: str, logprob: float, rank: int) -> dict[str, Any]:
    return {"decoded_token": text, "logprob": logprob, "rank": rank}


POSITIONS = [
    {3: token("é", -1.0, 2), 4: token("e", -0.5, 1)},
    {5: token("\ufffd", float("-inf"), 3), 4: token("e", -0.1, 1), 3: token("é", -0.2, 2)},
    {EOS: token("</s>", -0.1, 1)},
]


def generated(**changes: Any) -> dict[str, Any]:
    fields = {
        "generated_text": "é\ufffd", "generated_tokens": [3, 5, EOS], "finish_reason": "stop", "stop_reason": None,
        "logprobs": None, "outputs": None, "num_input_tokens": 4, "num_cached_tokens": 1, "num_generated_tokens": 3,
    }  # fmt: skip
    return {**fields, **changes}


def chat(num_top: int | None = None, tools: Any = None, **row: Any) -> ChatCompletion:
    prompt = {"messages": [], "tools": tools}
    request = BatchRequest("a", CHAT, "gpt", prompt, SamplingParams(), num_top=num_top)
    return ChatCompletion.model_validate(body(request, row), strict=True)


def text(num_top: int | None = None, echo: bool = False, **row: Any) -> Completion:
    request = BatchRequest("a", COMPLETIONS, "gpt", {"prompt": "Q: "}, SamplingParams(), echo=echo, num_top=num_top)
    return Completion.model_validate(body(request, row), strict=True)


def body(request: BatchRequest, row: dict[str, Any]) -> dict[str, Any]:
    line = json.loads(answer_line(request, generated(**row), 1_700_000_000, "fp_1"))
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("a", None, 200)
    return line["response"]["body"]


def test_a_chat_is_answered_with_a_message() -> None:
    answer = chat()
    assert (answer.model, answer.created, answer.system_fingerprint) == ("gpt", 1_700_000_000, "fp_1")
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason, choice.logprobs) == ("é\ufffd", "stop", None)
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 3, 7)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 1


def test_a_completion_is_answered_with_a_text() -> None:
    answer = text(finish_reason="length")
    assert answer.id.startswith("cmpl-")
    assert [(one.text, one.finish_reason, one.logprobs) for one in answer.choices] == [("é\ufffd", "length", None)]
    assert text(echo=True).choices[0].text == "Q: é\ufffd"


def test_several_sequences_are_several_choices() -> None:
    sequences = [
        {"index": i, "text": t, "token_ids": [3], "finish_reason": "length", "stop_reason": None, "logprobs": None}
        for i, t in enumerate("xy")
    ]
    assert [(one.index, one.message.content) for one in chat(outputs=sequences).choices] == [(0, "x"), (1, "y")]


def test_log_probabilities_of_a_chat_are_those_of_its_text() -> None:
    logprobs = chat(num_top=1, logprobs=POSITIONS).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(one.token, one.logprob, one.bytes) for one in logprobs.content] == [
        ("é", -1.0, [195, 169]),
        ("\ufffd", -9999.0, None),
    ]
    assert [[top.token for top in one.top_logprobs] for one in logprobs.content] == [["e"], ["e"]]


def test_a_likely_token_of_bytes_has_its_bytes() -> None:
    position = {3: token("", -1.0, 2), 4: token("<0xC3><0xA9>", -0.5, 1)}
    logprobs = chat(num_top=1, logprobs=[position], generated_tokens=[3], finish_reason="length").choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].bytes == []
    assert logprobs.content[0].top_logprobs[0].bytes == [0xC3, 0xA9]


def test_log_probabilities_of_a_completion_are_those_of_its_text() -> None:
    logprobs = text(num_top=1, logprobs=POSITIONS).choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (
        ["é", "\ufffd"],
        [-1.0, -9999.0],
        [0, 1],
    )
    assert logprobs.top_logprobs == [{"e": -0.5, "é": -1.0}, {"e": -0.1, "\ufffd": -9999.0}]
    assert text(num_top=0, logprobs=POSITIONS).choices[0].logprobs.top_logprobs is None


@pytest.mark.parametrize(("reason", "stop_reason", "num"), [("length", None, 3), ("stop", "é", 3), ("stop", "9", 2)])
def test_a_token_that_ended_the_text_is_not_part_of_it(reason: str, stop_reason: str | None, num: int) -> None:
    logprobs = chat(num_top=0, logprobs=POSITIONS, finish_reason=reason, stop_reason=stop_reason).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == num
    assert logprobs.content[0].top_logprobs == []


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_only_the_first_tool_call_is_answered_where_the_body_asks_for_one() -> None:
    prompt = {"messages": [], "tools": [{}]}
    request = BatchRequest("a", CHAT, "gpt", prompt, SamplingParams(), max_tool_calls=1)
    (choice,) = body(request, {"tool_calls": [CALL, {**CALL, "id": "call_2"}], "content": None})["choices"]
    assert choice["message"]["tool_calls"] == [CALL]


def test_tool_calls_and_reasoning_stand_apart() -> None:
    read = {"tool_calls": [CALL], "content": None, "reasoning_content": "hm"}
    (choice,) = chat(tools=[{}], **read).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].id == "call_1"
    assert choice.message.model_extra == {"reasoning_content": "hm"}


def test_without_tools_there_are_no_calls() -> None:
    (choice,) = chat(tool_calls=[CALL], content=None).choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", "é\ufffd", None)


def test_an_error_stands_where_a_reader_of_either_field_finds_it() -> None:
    line = json.loads(error_line(LineError("invalid_value", "no", "n", custom_id="a"), 7))
    assert BatchError.model_validate(line["error"], strict=True) == BatchError(
        code="invalid_value", message="no", param="n", line=7
    )
    answered = {"message": "no", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    assert line["response"]["body"] == {"error": answered}
    assert (line["custom_id"], line["response"]["status_code"]) == ("a", 400)


def test_what_is_no_request_has_no_response() -> None:
    line = json.loads(error_line(duplicate_error("a"), 3))
    assert (line["response"], line["error"]["code"], line["custom_id"]) == (None, "duplicate_custom_id", "a")


def test_errors_of_the_run_have_the_apis_codes() -> None:
    long = error_of_run("PromptTooLongError", "300 tokens of 200", "a")
    assert (long.code, long.status, long.as_body()["error"]["type"]) == (
        "context_length_exceeded", 400, "invalid_request_error",
    )  # fmt: skip
    dead = error_of_run("ReplicaDiedError", "twice", "a")
    assert (dead.code, dead.status, dead.as_body()["error"]["type"]) == ("server_error", 500, "server_error")
