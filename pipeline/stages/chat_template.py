"""Conversations to prompts: `messages` -> `prompt`, `tokenized_prompt`."""

from __future__ import annotations

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
        prompts = [self._render(rows[index][columns.MESSAGES]) for index in chats]
        token_ids = self._tokenizer.encode_batch(prompts, add_special_tokens=False)
        for index, prompt, ids in zip(chats, prompts, token_ids, strict=True):
            results[index] = {columns.PROMPT: prompt, columns.TOKENIZED_PROMPT: ids}
        return results

    def _render(self, messages: Any) -> str:
        plain = _plain_messages(messages)
        continues = plain[-1].get("role") == "assistant"
        return self._tokenizer.render_chat(plain, continue_final_message=continues, **self._template_kwargs)


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Returns messages as lists and dicts without empty fields, which Arrow adds where messages differ in theirs."""
    messages = messages.tolist() if hasattr(messages, "tolist") else messages
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError(
            "messages must be a non-empty list of {'role': ..., 'content': ...}; "
            f"got {type(messages).__name__} {messages!r:.80}"
        )
    plain = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"message {index} must be a dict with 'role' and 'content'; got {message!r:.80}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise ChatTemplateError(f"message {index} ({message['role']}) has no content")
        plain.append({key: value for key, value in message.items() if value is not None})
    return plain
