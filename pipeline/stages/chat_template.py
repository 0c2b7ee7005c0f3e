"""Conversations to prompts: `messages` -> `prompt`, `tokenized_prompt`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...engine import Tokenizer
from ...engine.errors import ChatTemplateError
from .. import columns
from .base import BatchStage


class ChatTemplateStage(BatchStage):
    """Renders a row's conversation with the model's chat template and tokenises the rendering.

    A rendered conversation already holds its special tokens, so it is tokenised here, without adding them again. A
    conversation that ends with the assistant's turn is continued. Rows without `messages` pass by.

    A row may bring `chat_template_kwargs`, which come before those of the stage, `tools`, and a `chat_template` of its
    own. Where these differ from row to row in their fields, let the column hold them as JSON text: a column of Arrow
    has one type.

    Args:
        tokenizer: The model's tokenizer.
        template_kwargs: Variables of the template.
        stop_on_error: Whether the first failed row stops the job.
    """

    name = "chat_template"

    def __init__(
        self, tokenizer: Tokenizer, template_kwargs: Mapping[str, Any] | None = None, *, stop_on_error: bool = False
    ) -> None:
        super().__init__(stop_on_error=stop_on_error)
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})

    def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Renders and tokenises the rows that hold a conversation."""
        results: list[dict[str, Any]] = [{} for _ in rows]
        chats = [index for index, row in enumerate(rows) if row.get(columns.MESSAGES) is not None]
        prompts = [self._render(rows[index]) for index in chats]
        token_ids = self._tokenizer.encode_batch(prompts, add_special_tokens=False)
        for index, prompt, ids in zip(chats, prompts, token_ids, strict=True):
            results[index] = {columns.PROMPT: prompt, columns.TOKENIZED_PROMPT: ids}
        return results

    def _render(self, row: Mapping[str, Any]) -> str:
        messages = _plain_messages(row[columns.MESSAGES])
        continues = messages[-1].get("role") == "assistant"
        variables = {"continue_final_message": continues, **self._template_kwargs, **_row_kwargs(row)}
        return self._tokenizer.render_chat(messages, **variables)


def _row_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the row itself says of its template: the variables, the tools and the text."""
    kwargs = _read_json(row.get(columns.CHAT_TEMPLATE_KWARGS), columns.CHAT_TEMPLATE_KWARGS) or {}
    if not isinstance(kwargs, Mapping):
        raise ChatTemplateError(f"column {columns.CHAT_TEMPLATE_KWARGS!r} must be a dict; got {kwargs!r:.80}")
    tools = _read_json(row.get(columns.TOOLS), columns.TOOLS)
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(one, Mapping) for one in tools)):
        raise ChatTemplateError(f"column {columns.TOOLS!r} must be a list of descriptions of tools; got {tools!r:.80}")
    template = row.get(columns.CHAT_TEMPLATE)
    if template is not None and not isinstance(template, str):
        raise ChatTemplateError(f"column {columns.CHAT_TEMPLATE!r} must be Jinja text; got {template!r:.80}")
    given = {columns.TOOLS: tools or None, columns.CHAT_TEMPLATE: template or None}
    return {**kwargs, **{name: value for name, value in given.items() if value is not None}}


def _read_json(value: Any, column: str) -> Any:
    """Returns a value that came as JSON text or as it is."""
    if not isinstance(value, str):
        return _without_nulls(value)
    try:
        return json.loads(value)
    except ValueError as error:
        raise ChatTemplateError(f"column {column!r} holds text that is no JSON: {error}; got {value!r:.80}") from None


def _without_nulls(value: Any) -> Any:
    """Returns a value as lists and dicts without the empty fields that Arrow adds where rows differ in theirs."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    plain = _without_nulls(messages)
    if not isinstance(plain, list) or not plain:
        raise ChatTemplateError(
            "messages must be a non-empty list of {'role': ..., 'content': ...}; "
            f"got {type(messages).__name__} {messages!r:.80}"
        )
    for index, message in enumerate(plain):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"message {index} must be a dict with 'role' and 'content'; got {message!r:.80}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise ChatTemplateError(f"message {index} ({message['role']}) has no content")
        for call in message.get("tool_calls") or ():
            _read_arguments(call)
    return plain


def _read_arguments(call: Any) -> None:
    """Turns a call's arguments from JSON text, as OpenAI's API has them, into what templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ChatTemplateError(f"a tool call must be a dict with a 'function'; got {call!r:.80}")
    if isinstance(function.get("arguments"), str):
        function["arguments"] = _read_json(function["arguments"] or "{}", "messages")
