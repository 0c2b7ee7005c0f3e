"""The model's text taken apart: `generated_text` -> `reasoning_content`, `tool_calls`, `content`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from ...engine import Tokenizer
from .. import columns
from ..answers.reasoning import ReasoningFormat, split_reasoning
from ..answers.tool_calls import ToolCallFormat, parse_tool_calls
from .base import Stage


class AnswerStage(Stage):
    """Reads the text of a row, and of each of its sequences where it has several.

    Args:
        tokenizer: The model's tokenizer.
        marks: What the text must hold to be read. Where one of them is a special token, which `generated_text` is
            without, the text is decoded anew from the tokens.
        reads_content: Whether an earlier stage has read the text, so that `content` is what is left of it.
        stop_on_error: Whether the first failed row stops the job.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        marks: Collection[str],
        *,
        reads_content: bool = False,
        stop_on_error: bool = False,
    ) -> None:
        super().__init__(stop_on_error=stop_on_error)
        self._tokenizer = tokenizer
        self._reads_content = reads_content
        self._needs_special_tokens = not tokenizer.special_tokens.isdisjoint(marks)

    @abstractmethod
    def read(self, text: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the columns that a text makes.

        Args:
            text: What the model wrote; None if an earlier stage left nothing of it.
            row: The row, for its prompt.
        """

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the row's text."""
        first = self._text(row, row, columns.GENERATED_TEXT, columns.GENERATED_TOKENS)
        sequences = row.get(columns.OUTPUTS)
        if sequences is None:
            return self.read(first, row)
        read = [{**one, **self.read(self._text(row, one, "text", "token_ids"), row)} for one in sequences]
        return {**self.read(first, row), columns.OUTPUTS: read}

    def _text(self, row: Mapping[str, Any], sequence: Mapping[str, Any], text: str, token_ids: str) -> str | None:
        if self._reads_content:
            return sequence[columns.CONTENT]
        if sequence[text] is not None and not self._needs_special_tokens:
            return sequence[text]
        tokens = sequence[token_ids]
        shown = tokens[:-1] if sequence[columns.FINISH_REASON] == "stop" else tokens
        return self._tokenizer.decode(row[columns.PROMPT_TOKEN_IDS], shown, not self._needs_special_tokens)


class ReasoningStage(AnswerStage):
    """Splits the text into what the model thought and what it answers.

    Args:
        tokenizer: The model's tokenizer.
        kind: How the model marks its reasoning.
        further_marks: What stages after this one look for in the text.
        stop_on_error: Whether the first failed row stops the job.
    """

    name = "reasoning"

    def __init__(
        self,
        tokenizer: Tokenizer,
        kind: ReasoningFormat,
        further_marks: Collection[str] = (),
        *,
        stop_on_error: bool = False,
    ) -> None:
        super().__init__(tokenizer, [*kind.marks, *further_marks], stop_on_error=stop_on_error)
        self._kind = kind

    def read(self, text: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
        """Splits a text."""
        reasoning, answer = split_reasoning(self._kind, text or "", row.get(columns.PROMPT))
        return {columns.REASONING_CONTENT: reasoning, columns.CONTENT: answer}


class ToolCallStage(AnswerStage):
    """Takes the tool calls out of the text. A call that cannot be read stays in it, and `tool_call_error` says why.

    Args:
        tokenizer: The model's tokenizer.
        kind: How the model writes calls.
        reads_content: Whether a reasoning stage has read the text before.
        stop_on_error: Whether the first failed row stops the job.
    """

    name = "tool_call"

    def __init__(
        self, tokenizer: Tokenizer, kind: ToolCallFormat, *, reads_content: bool = False, stop_on_error: bool = False
    ) -> None:
        super().__init__(tokenizer, kind.marks, reads_content=reads_content, stop_on_error=stop_on_error)
        self._kind = kind

    def read(self, text: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the calls out of a text."""
        if text is None:
            return {columns.TOOL_CALLS: [], columns.CONTENT: None, columns.TOOL_CALL_ERROR: None}
        asked = row.get(columns.PROMPT) or str(row.get(columns.PROMPT_TOKEN_IDS))
        parsed = asdict(parse_tool_calls(self._kind, text, asked))
        return {columns.TOOL_CALL_ERROR: parsed.pop("error"), **parsed}
