"""`response_body`: the body of an answer of `/v1/responses`, the API's `Response`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ... import columns
from .request import BatchRequest

REPEATED: dict[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0,
}  # fmt: skip
"""Fields of the body that the answer repeats, and their values where the body leaves them out."""


def response_body(
    request: BatchRequest,
    row: Mapping[str, Any],
    sequence: Mapping[str, Any],
    message: Mapping[str, Any],
    logprobs: Mapping[str, Any] | None,
    created_s: int,
) -> dict[str, Any]:
    """Returns the body of an answer.

    Args:
        request: The request.
        row: The row of the request after the engine and the stages that follow it.
        sequence: The only sequence of the row.
        message: The sequence as the message of a chat.
        logprobs: Log-probabilities as a choice of a chat holds them; None for none.
        created_s: Time of the answer, in seconds since 1970.
    """
    is_whole = sequence["finish_reason"] != "length"
    status = "completed" if is_whole else "incomplete"
    reasoning = {"effort": request.body.get("reasoning", {}).get("effort"), "summary": None}
    return {
        "id": _new_id("resp_"),
        "object": "response",
        "created_at": created_s,
        "status": status,
        "error": None,
        "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
        "model": request.model,
        "output": list(_items(message, logprobs, status)),
        "usage": _usage(row),
        **{name: request.body.get(name, usual) for name, usual in REPEATED.items()},
        "temperature": request.sampling.temperature,
        "top_p": request.body.get("top_p", request.sampling.top_p),
        "reasoning": reasoning,
        "previous_response_id": None,
        "truncation": "disabled",
    }


def _items(message: Mapping[str, Any], logprobs: Mapping[str, Any] | None, status: str) -> Iterator[dict[str, Any]]:
    """Yields the reasoning, the text and the tool calls of a message, as far as it has them."""
    if message.get(columns.REASONING_CONTENT) is not None:
        content = [{"type": "reasoning_text", "text": message[columns.REASONING_CONTENT]}]
        yield {"id": _new_id("rs_"), "type": "reasoning", "summary": [], "content": content, "status": status}
    calls = message.get("tool_calls", ())
    if message["content"] is not None:
        text = {"type": "output_text", "text": message["content"], "annotations": []}
        if logprobs is not None:
            text["logprobs"] = [_token(one) for one in logprobs["content"]]
        yield {"id": _new_id("msg_"), "type": "message", "role": "assistant", "status": status, "content": [text]}
    for call in calls:
        fields = {"call_id": call["id"], **call["function"], "status": "completed"}
        yield {"id": _new_id("fc_"), "type": "function_call", **fields}


def _token(token: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a token of a chat as the API's `Response` has it, where the bytes are a list in any case."""
    top = [{**one, "bytes": one["bytes"] or []} for one in token.get("top_logprobs", ())]
    return {**token, "bytes": token["bytes"] or [], "top_logprobs": top}


def _usage(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the counts of tokens. The type wants counts of cache writes and of reasoning; these are not counted."""
    num_in, num_out = row[columns.NUM_INPUT_TOKENS], row[columns.NUM_GENERATED_TOKENS]
    return {
        "input_tokens": num_in,
        "input_tokens_details": {"cached_tokens": row[columns.NUM_CACHED_TOKENS], "cache_write_tokens": 0},
        "output_tokens": num_out,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_in + num_out,
    }


def _new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex
