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
        row_settings: Columns of the input that hold settings of their row.
        has_adapters: Whether the column `model` names the adapter of its row.
    """

    templates: tuple[Template, ...]
    roles: tuple[str, ...]
    sampling: Mapping[str, Any] | None
    row_settings: tuple[str, ...] = ()
    has_adapters: bool = False

    @classmethod
    def of(cls, job: JobConfig) -> MakePrompt:
        """Returns the `preprocess` of a job."""
        roles = tuple(message.role for message in job.messages or [])
        return cls(tuple(job.templates()), roles, job.sampling, tuple(job.row_settings or ()), job.has_adapters)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns what the job asks for and the row itself, as columns to merge into the row.

        All other columns become None, so that stages read no column that the job file does not name.
        """
        if row.get(READ_ERROR) is not None:
            raise PromptTypeError(row[READ_ERROR])
        given = {name: row[name] for name in self.row_settings}
        if self.has_adapters:
            given[columns.MODEL] = row.get(columns.MODEL)
        asked = {columns.INPUT: row, columns.SAMPLING_PARAMS: self.sampling, **self._prompt(row), **given}
        return {**dict.fromkeys(row), **asked}

    def _prompt(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if not self.templates:
            return {name: row[name] for name in (columns.PROMPT, columns.MESSAGES) if name in row}
        texts = [template.render(row) for template in self.templates]
        if not self.roles:
            return {columns.PROMPT: texts[0]}
        return {
            columns.MESSAGES: [{"role": role, "content": text} for role, text in zip(self.roles, texts, strict=True)]
        }


@dataclass(frozen=True)
class MakeResult:
    """The `postprocess` function of a job, which adds the output to the row as it was read.

    Attributes:
        output_column: Name of the column of the generated text.
    """

    output_column: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns of the output. The writer drops columns that are not in its schema."""
        result = {**row[columns.INPUT], self.output_column: row[columns.GENERATED_TEXT]}
        if row[columns.OUTPUTS] is not None:  # The job asks for several sequences, so no column has this name.
            result[columns.OUTPUTS] = [one["text"] for one in row[columns.OUTPUTS]]
        return {**result, **{name: row[name] for name in REPORTED}}
