"""The `preprocess` and `postprocess` of a job: the prompt of a row, and the row of the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engine.errors import PromptTypeError
from .. import columns
from ..sources import READ_ERROR
from .config import JobConfig
from .template import Template

REPORTED = (
    columns.FINISH_REASON,
    columns.NUM_INPUT_TOKENS,
    columns.NUM_CACHED_TOKENS,
    columns.NUM_GENERATED_TOKENS,
)
"""Columns that every output has, besides the text."""


@dataclass(frozen=True)
class MakePrompt:
    """The `preprocess` function of a job, which makes the prompt of a row.

    Attributes:
        templates: Template of the prompt, or of each message.
        roles: Roles of the messages; empty for a prompt.
        sampling: Sampling parameters of the job.
    """

    templates: tuple[Template, ...]
    roles: tuple[str, ...]
    sampling: Mapping[str, Any] | None

    @classmethod
    def of(cls, job: JobConfig) -> MakePrompt:
        """Returns the `preprocess` of a job."""
        roles = tuple(message.role for message in job.messages or [])
        return cls(tuple(job.templates()), roles, job.sampling)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the prompt or messages, the sampling parameters and the row itself, as columns to merge into it."""
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
    """The `postprocess` function of a job, which adds the output to the row as it was read.

    Attributes:
        output_column: Name of the column of the generated text.
    """

    output_column: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns of the output. The writer drops columns that are not in its schema."""
        texts = [one["text"] for one in row[columns.OUTPUTS] or []]
        return {
            **row[columns.INPUT],
            self.output_column: row[columns.GENERATED_TEXT],
            columns.OUTPUTS: texts,
            **{name: row[name] for name in REPORTED},
        }
