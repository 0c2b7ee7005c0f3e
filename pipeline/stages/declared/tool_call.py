"""`ToolCallStage`: parses `generated_text` into the columns `tool_calls`, `tool_call_error` and `content`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from ... import columns
from ...answers.tool_calls import TOOL_CALL_FORMATS, ToolCallFormat, parse_tool_calls
from ..answer import AnswerStage, AnswerStageConfig, make_answer_stage
from ..declaration import Side, StageDeclaration

FIELD = "tool_call_stage"


class ToolCallStageConfig(AnswerStageConfig):
    """Settings of the stage that reads tool calls. `parser` is a name in `TOOL_CALL_FORMATS`."""

    field: ClassVar[str] = FIELD
    formats: ClassVar[Mapping[str, ToolCallFormat]] = TOOL_CALL_FORMATS


class ToolCallStage(AnswerStage[ToolCallFormat]):
    """A stage that moves tool calls from the text to `tool_calls`; a malformed call stays, see `tool_call_error`."""

    name = "tool_call"

    def read(self, text: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the calls, the error and the remaining text as columns."""
        if text is None:
            return {columns.TOOL_CALLS: [], columns.CONTENT: None, columns.TOOL_CALL_ERROR: None}
        asked = row.get(columns.PROMPT) or str(row.get(columns.PROMPT_TOKEN_IDS))
        parsed = asdict(parse_tool_calls(self._format, text, asked))
        return {columns.TOOL_CALL_ERROR: parsed.pop("error"), **parsed}


STAGE = StageDeclaration(
    ToolCallStage,
    config=ToolCallStageConfig(enabled=False),
    make=functools.partial(make_answer_stage, ToolCallStage),
    side=Side.AFTER_ENGINE,
    order=30,
    field=FIELD,
    required=(columns.GENERATED_TEXT,),
)
