"""`ChatTemplateStage`: renders the column `messages` to the columns `prompt` and `tokenized_prompt`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ....engine import Tokenizer
from ....engine.errors import ChatTemplateError
from ... import columns
from ..base import BatchStage
from ..declaration import ProcessorSettings, Side, StageDeclaration
from ..stage_config import StageConfig
from ..tokenizers import tokenizer_of


class ChatTemplateStageConfig(StageConfig):
    """Settings of the stage that renders `messages`.

    Attributes:
        chat_template: Jinja text or file that replaces the model's template.
        chat_template_kwargs: Variables of the template, such as `enable_thinking`.
    """

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatTemplateStage(BatchStage):
    """A stage that renders conversations with the model's chat template and tokenises the prompts.

    A rendered conversation already holds its special tokens, so the stage tokenises it without adding them again. A
    conversation that ends with the assistant's turn is continued. Rows without `messages` stay as they are.

    A row may bring `tools`, a `chat_template`, and `chat_template_kwargs`, which override the settings of the stage. A
    column of Arrow has one type, so values whose fields differ from row to row may be given as JSON text.

    Args:
        tokenizer: The model's tokenizer.
        template_kwargs: Variables of the template.
    """

    name = "chat_template"

    def __init__(self, tokenizer: Tokenizer, template_kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})

    def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Returns the prompt and its tokens for each row with a conversation, and no columns for other rows."""
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
    """Returns the arguments for the template from the row: variables, tools, and a template."""
    kwargs = _read_json(row.get(columns.CHAT_TEMPLATE_KWARGS), columns.CHAT_TEMPLATE_KWARGS) or {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise ChatTemplateError(f"column {columns.CHAT_TEMPLATE_KWARGS!r} must map names to values; got {kwargs!r:.80}")
    tools = _read_json(row.get(columns.TOOLS), columns.TOOLS)
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(one, Mapping) for one in tools)):
        raise ChatTemplateError(f"column {columns.TOOLS!r} must be a list of descriptions of tools; got {tools!r:.80}")
    template = row.get(columns.CHAT_TEMPLATE)
    if template is not None and not isinstance(template, str):
        raise ChatTemplateError(f"column {columns.CHAT_TEMPLATE!r} must be Jinja text; got {template!r:.80}")
    given = {columns.TOOLS: tools or None, columns.CHAT_TEMPLATE: template or None}
    return {**kwargs, **{name: value for name, value in given.items() if value is not None}}


def _read_json(value: Any, column: str) -> Any:
    """Returns the value of a column, parsed if it is JSON text; `column` is its name, for the error."""
    if not isinstance(value, str):
        return _without_nulls(value)
    try:
        return json.loads(value)
    except ValueError as error:
        raise ChatTemplateError(f"column {column!r} holds text that is no JSON: {error}; got {value!r:.80}") from None


def _without_nulls(value: Any) -> Any:
    """Returns a value as lists and dicts, without the null fields that Arrow adds if rows differ."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    plain = _read_json(messages, columns.MESSAGES)
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
    """Replaces the arguments of a tool call in place: OpenAI's JSON text becomes a dict, which templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ChatTemplateError(f"a tool call must be a dict with a 'function'; got {call!r:.80}")
    if isinstance(function.get("arguments"), str):
        # A model that was cut off leaves arguments that are no JSON; templates get these as the text that they are.
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(function["arguments"] or "{}")
            if isinstance(arguments, dict):
                function["arguments"] = arguments


def chosen_template(settings: ProcessorSettings) -> str | None:
    """Returns the chat template that the settings name; None for the model's own, or if the stage is off."""
    config = settings.stage_config(STAGE)
    return config.chat_template or settings.engine_config.chat_template if config.enabled else None


def _make(settings: ProcessorSettings, config: ChatTemplateStageConfig) -> ChatTemplateStage:
    tokenizer = tokenizer_of(settings, config, chosen_template(settings))
    return ChatTemplateStage(tokenizer, config.chat_template_kwargs)


STAGE = StageDeclaration(
    ChatTemplateStage,
    config=ChatTemplateStageConfig(),
    make=_make,
    side=Side.BEFORE_ENGINE,
    order=10,
    field="chat_template_stage",
    required=(columns.MESSAGES,),
    optional=(columns.PROMPT, columns.CHAT_TEMPLATE_KWARGS, columns.TOOLS, columns.CHAT_TEMPLATE),
)
