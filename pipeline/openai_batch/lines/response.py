"""Writes the lines of the two output files: `answer_line` for an answered row, `error_line` for an error."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import to_json

from ... import columns
from ...answers.tool_calls import JSON_LIST, parse_tool_calls
from .fields import CHAT, RESPONSES
from .line_error import LineError
from .request import BatchRequest, PooledRequest
from .response_object import response_body

Token = Mapping[str, Any]
"""A token at a position, with the keys `decoded_token`, `logprob` and `rank`."""

LOWEST_LOGPROB = -9999.0
"""Log-probability that the API gives for a probability of zero, because JSON has no infinity."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""Character in the decoded text of a token at the end of an output that ends within a character."""

BYTES = re.compile("(<0x[0-9A-F]{2}>)+")
"""Text of a token that holds bytes and no whole character; see `Logprob.decoded_token`."""


def answer_line(
    request: BatchRequest | PooledRequest, row: Mapping[str, Any], created_s: int, fingerprint: str
) -> bytes:
    """Returns the line of the out file for an answered request.

    Args:
        request: The request.
        row: The row of the request after the engine and the stages that follow it.
        created_s: Time of the answer, in seconds since 1970.
        fingerprint: The `system_fingerprint` of the answer.

    Returns:
        The line as JSON, with a newline at its end.
    """
    if not isinstance(request, BatchRequest):
        return _line(request.custom_id, 200, request.body(row, created_s), None)
    chat = request.url == CHAT
    sequences = row[columns.OUTPUTS] or [_only_sequence(row)]
    if request.url == RESPONSES:
        (one,) = sequences
        logprobs = _chat_logprobs(request, one)
        return _line(
            request.custom_id, 200, response_body(request, row, one, _message(request, one), logprobs, created_s), None
        )
    body = {
        "id": _new_id("chatcmpl-" if chat else "cmpl-"),
        "object": "chat.completion" if chat else "text_completion",
        "created": created_s,
        "model": request.model,
        "choices": [(_chat_choice if chat else _text_choice)(request, one) for one in sequences],
        "usage": _usage(row),
        "system_fingerprint": fingerprint,
    }
    return _line(request.custom_id, 200, body, None)


def error_line(error: LineError, line: int | None) -> bytes:
    """Returns the line of the error file for a request without an answer.

    Args:
        error: The reason that there is no answer.
        line: Number of the line in the batch file, from 1.

    Returns:
        The line as JSON, with a newline at its end.
    """
    return _line(error.custom_id, error.status, error.as_body(), error.as_error(line))


def _line(custom_id: str | None, status: int | None, body: dict[str, Any], error: dict[str, Any] | None) -> bytes:
    response = None if status is None else {"status_code": status, "request_id": _new_id("req_"), "body": body}
    line = {"id": _new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": error}
    return to_json(line) + b"\n"


def _new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def _only_sequence(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "index": 0,
        "text": row[columns.GENERATED_TEXT],
        "token_ids": row[columns.GENERATED_TOKENS],
        "finish_reason": row[columns.FINISH_REASON],
        "stop_reason": row[columns.STOP_REASON],
        "logprobs": row[columns.LOGPROBS],
        **{name: row.get(name) for name in (columns.CONTENT, columns.REASONING_CONTENT, columns.TOOL_CALLS)},
    }


def _chat_choice(request: BatchRequest, sequence: Mapping[str, Any]) -> dict[str, Any]:
    message, finish_reason = _message(request, sequence), sequence["finish_reason"]
    return {
        "index": sequence["index"],
        "message": message,
        "logprobs": _chat_logprobs(request, sequence),
        "finish_reason": "tool_calls" if "tool_calls" in message and finish_reason == "stop" else finish_reason,
    }


def _message(request: BatchRequest, sequence: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a sequence as the API's message, with fields for the reasoning and tool calls that the stages found."""
    message = {"role": "assistant", "content": sequence["text"], "refusal": None}
    # A constrained answer has neither reasoning nor tool calls in the format of the model.
    if request.sampling.structured_outputs is not None:
        return {**message, **(_forced_calls(request, sequence["text"]) if request.is_forced else {})}
    reasoning = sequence.get(columns.REASONING_CONTENT)
    calls = sequence.get(columns.TOOL_CALLS) if request.prompt[columns.TOOLS] else None
    if calls or reasoning is not None:
        message["content"] = sequence.get(columns.CONTENT)
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls[: request.max_tool_calls]
    return message


def _forced_calls(request: BatchRequest, text: str) -> dict[str, Any]:
    """Returns the message fields of a forced answer; empty if the text is no whole list of calls, as when cut off."""
    read = parse_tool_calls(JSON_LIST, text, request.custom_id)
    return {"content": read.content, "tool_calls": read.tool_calls} if read.tool_calls else {}


def _text_choice(request: BatchRequest, sequence: Mapping[str, Any]) -> dict[str, Any]:
    text = sequence["text"]
    return {
        "index": sequence["index"],
        "text": request.prompt[columns.PROMPT] + text if request.echo else text,
        "logprobs": _text_logprobs(request, sequence),
        "finish_reason": sequence["finish_reason"],
    }


def _usage(row: Mapping[str, Any]) -> dict[str, Any]:
    num_in, num_out = row[columns.NUM_INPUT_TOKENS], row[columns.NUM_GENERATED_TOKENS]
    return {
        "prompt_tokens": num_in,
        "completion_tokens": num_out,
        "total_tokens": num_in + num_out,
        "prompt_tokens_details": {"cached_tokens": row[columns.NUM_CACHED_TOKENS]},
    }


def _chat_logprobs(request: BatchRequest, sequence: Mapping[str, Any]) -> dict[str, Any] | None:
    if request.num_top is None:
        return None
    content = []
    for drawn, likely in _positions(request, sequence):
        content.append({**_chat_token(drawn), "top_logprobs": [_chat_token(one) for one in likely]})
    return {"content": content, "refusal": None}


def _chat_token(token: Token) -> dict[str, Any]:
    text = _text_of(token)
    return {"token": text, "logprob": _logprob_of(token), "bytes": _bytes_of(text)}


def _bytes_of(text: str) -> list[int] | None:
    """Returns the bytes of a token; None for the text of an output that ends within a character."""
    if BYTES.fullmatch(text):
        return list(bytes.fromhex(re.sub("<0x|>", "", text)))
    return None if BROKEN in text else list(text.encode())


def _text_logprobs(request: BatchRequest, sequence: Mapping[str, Any]) -> dict[str, Any] | None:
    if request.num_top is None:
        return None
    tokens, logprobs, tops, offsets, offset = [], [], [], [], 0
    for drawn, likely in _positions(request, sequence):
        tokens.append(_text_of(drawn))
        logprobs.append(_logprob_of(drawn))
        tops.append({_text_of(one): _logprob_of(one) for one in [*likely, drawn]})
        offsets.append(offset)
        offset += len(tokens[-1])
    top = tops if request.num_top else None
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}


def _positions(request: BatchRequest, sequence: Mapping[str, Any]) -> Iterator[tuple[Token, Sequence[Token]]]:
    """Yields the drawn token and the `num_top` most probable tokens, in order, of each position that is in the text."""
    token_ids, positions = sequence["token_ids"], sequence["logprobs"] or []
    if _ended_by_token(sequence) and not request.sampling.include_stop_str_in_output:
        token_ids, positions = token_ids[:-1], positions[:-1]
    num_top = request.num_top or 0
    for token_id, position in zip(token_ids, positions, strict=True):
        ranked = sorted(position.values(), key=lambda one: one["rank"])
        yield position[token_id], ranked[:num_top]


def _ended_by_token(sequence: Mapping[str, Any]) -> bool:
    """Returns whether the last token stopped the sequence, so that the text does not hold this token."""
    if sequence["finish_reason"] != "stop":
        return False
    return sequence["stop_reason"] in (None, str(sequence["token_ids"][-1]))


def _text_of(token: Token) -> str:
    return token["decoded_token"] or ""


def _logprob_of(token: Token) -> float:
    return max(token["logprob"], LOWEST_LOGPROB)
