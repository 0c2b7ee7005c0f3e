"""What a job asks a row, and what it makes of the answer: the `preprocess` and `postprocess` of its processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engine.errors import PromptTypeError
from .. import columns
from ..sources import READ_ERROR
from .template import Template

REPORTED = (
    columns.FINISH_REASON,
    columns.NUM_INPUT_TOKENS,
    columns.NUM_CACHED_TOKENS,
    columns.NUM_GENERATED_TOKENS,
)
"""What every output says of a row, besides its text."""


@dataclass(frozen=True)
class MakePrompt:
    """The job's `preprocess`: what a row asks the model.

    Attributes:
        templates: Of the prompt, or of each message.
        roles: Of the messages; empty for a prompt.
        sampling: The job's sampling parameters.
    """

    templates: tuple[Template, ...]
    roles: tuple[str, ...]
    sampling: Mapping[str, Any] | None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns that the stages read; those that the job leaves open are not the input's either."""
        if row.get(READ_ERROR) is not None:
            raise PromptTypeError(row[READ_ERROR])
        asked: dict[str, Any] = {columns.INPUT: row, columns.SAMPLING_PARAMS: self.sampling, columns.MODEL: None}
        if not self.templates:
            return asked
        texts = [template.render(row) for template in self.templates]
        if self.roles:
            pairs = zip(self.roles, texts, strict=True)
            messages = [{"role": role, "content": text} for role, text in pairs]
            return {**asked, columns.PROMPT: None, columns.MESSAGES: messages, columns.TOKENIZED_PROMPT: None}
        return {**asked, columns.PROMPT: texts[0], columns.MESSAGES: None, columns.TOKENIZED_PROMPT: None}


@dataclass(frozen=True)
class MakeResult:
    """The job's `postprocess`: the row as it was read, and what came of it.

    Attributes:
        output_column: Name of the column of the text.
    """

    output_column: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns of the output; those not in its schema are left out when it is written."""
        texts = [one["text"] for one in row[columns.OUTPUTS] or []]
        return {
            **row[columns.INPUT],
            self.output_column: row[columns.GENERATED_TEXT],
            columns.OUTPUTS: texts,
            **{name: row[name] for name in REPORTED},
        }
