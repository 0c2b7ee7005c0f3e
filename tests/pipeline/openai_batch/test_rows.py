"""A line on its way through the stages: what the chat template sees of it, and what a dead letter says of it."""

from __future__ import annotations

import json
from typing import Any

import fake_client
import pytest

from millrace.pipeline import columns
from millrace.pipeline.openai_batch.lines.line_error import BatchLineError
from millrace.pipeline.openai_batch.lines.request import RequestReader
from millrace.pipeline.openai_batch.rows import REQUEST, AskLine, error_of_row
from millrace.pipeline.stages.declared.chat_template import ChatTemplateStage

READER = RequestReader(("m",))
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "We"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def read(is_duplicate: bool = False, **body: Any) -> dict[str, Any]:
    fields = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    text = json.dumps({**fields, "body": {"model": "m", "messages": TURNS, **body}})
    return {"line": text.encode(), "line_number": 1, "is_duplicate": is_duplicate}


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({}, "<user>hi<assistant>We<assistant>"),
        ({"continue_final_message": True}, "<user>hi<assistant>We"),
        ({"tools": TOOLS}, f"<user>hi<assistant>We<assistant>tools={TOOLS}"),
        ({"tools": TOOLS, "tool_choice": "none"}, "<user>hi<assistant>We<assistant>"),
        ({"chat_template_kwargs": {"mood": "dry"}}, "<user>hi<assistant>We<assistant>mood=dry"),
    ],
)
def test_the_template_sees_what_the_body_says(body: dict[str, Any], prompt: str) -> None:
    row = AskLine(READER)(read(**body))
    assert ChatTemplateStage(fake_client.FakeTokenizer()).process_batch([row])[0][columns.PROMPT] == prompt
    assert row[REQUEST].custom_id == "a"


@pytest.mark.parametrize(
    ("row", "kind", "code"),
    [
        (read(temprature=1), "BatchLineError", "unknown_parameter"),
        (read(is_duplicate=True), "BatchLineError", "duplicate_custom_id"),
        (read(is_duplicate=True, temprature=1), "BatchLineError", "duplicate_custom_id"),
        (read(), "PromptTooLongError", "context_length_exceeded"),
        (read(), "ReplicaDiedError", "server_error"),
        (read(), "AdapterError", "model_not_found"),
    ],
)
def test_a_dead_letter_says_what_went_wrong(row: dict[str, Any], kind: str, code: str) -> None:
    dead = {**row, columns.ERROR_KIND: kind, columns.ERROR_MESSAGE: "why"}
    error = error_of_row(dead, READER)
    assert (error.code, error.custom_id) == (code, "a")
    if kind == "BatchLineError":
        with pytest.raises(BatchLineError, match=error.message[:20]):
            AskLine(READER)(row)
