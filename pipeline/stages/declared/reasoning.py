"""`ReasoningStage`: splits `generated_text` into the columns `reasoning_content` and `content`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from ... import columns
from ...answers.reasoning import REASONING_FORMATS, ReasoningFormat, split_reasoning
from ..answer import AnswerStage, AnswerStageConfig, make_answer_stage
from ..declaration import Side, StageDeclaration

FIELD = "reasoning_stage"


class ReasoningStageConfig(AnswerStageConfig):
    """Settings of the stage that splits `generated_text`. `parser` is a name in `REASONING_FORMATS`."""

    field: ClassVar[str] = FIELD
    formats: ClassVar[Mapping[str, ReasoningFormat]] = REASONING_FORMATS


class ReasoningStage(AnswerStage[ReasoningFormat]):
    """A stage that splits the text into the model's reasoning and its answer."""

    name = "reasoning"

    def read(self, text: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the reasoning and the answer of a text as columns."""
        reasoning, answer = split_reasoning(self._format, text or "", row.get(columns.PROMPT))
        return {columns.REASONING_CONTENT: reasoning, columns.CONTENT: answer}


STAGE = StageDeclaration(
    ReasoningStage,
    config=ReasoningStageConfig(enabled=False),
    make=functools.partial(make_answer_stage, ReasoningStage),
    side=Side.AFTER_ENGINE,
    order=20,
    field=FIELD,
    required=(columns.GENERATED_TEXT,),
)
