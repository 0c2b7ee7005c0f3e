"""The `preprocess` and `postprocess` of a job: the prompt of a row, and the row of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ...engine.errors import PromptTypeError
from .. import columns
from ..pooling.pairs import pair_columns
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

REPORTED_OF_POOLING = (columns.NUM_INPUT_TOKENS, columns.NUM_CACHED_TOKENS)
"""Columns that the output of a pooling task has, besides the answer."""


def reported(job: JobConfig) -> tuple[str, ...]:
    """Returns the columns about its run that each row of the output has."""
    return REPORTED_OF_POOLING if job.task.is_pooling else REPORTED


@dataclass(frozen=True)
class MakePrompt:
    """The `preprocess` function of a job, which makes the prompt of a row.

    Attributes:
        templates: Template of the prompt, or of each message.
        roles: Roles of the messages; empty for a prompt.
        sampling: Sampling parameters of the job.
        row_settings: Columns of the input that hold settings of their row.
        has_adapters: Whether the column `model` names the adapter of its row.
        reads_pairs: Whether rows have pairs of texts to score, and no prompt.
        score_columns: Columns of these texts; None for the usual ones.
    """

    templates: tuple[Template, ...]
    roles: tuple[str, ...]
    sampling: Mapping[str, Any] | None
    row_settings: tuple[str, ...] = ()
    has_adapters: bool = False
    reads_pairs: bool = False
    score_columns: Sequence[str] | None = None

    @classmethod
    def of(cls, job: JobConfig) -> MakePrompt:
        """Returns the `preprocess` of a job."""
        roles = tuple(message.role for message in job.messages or [])
        settings, pairs = tuple(job.row_settings or ()), (job.task.reads_pairs, job.score_columns)
        return cls(tuple(job.templates()), roles, job.sampling, settings, job.has_adapters, *pairs)

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
        if self.reads_pairs:
            first, second = self.score_columns or pair_columns(row)
            return {columns.TEXT_1: row.get(first), columns.TEXT_2: row.get(second)}
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
        output_column: Name of the column of the answer.
        answers: Columns that the task of the job adds to a row; the first is the answer.
        reported: Columns about the run of the row.
        are_scores_listed: Whether a score alone becomes a list, because the column holds lists.
    """

    output_column: str
    answers: tuple[str, ...] = (columns.GENERATED_TEXT,)
    reported: tuple[str, ...] = REPORTED
    are_scores_listed: bool = False

    @classmethod
    def of(cls, job: JobConfig, schema: pa.Schema) -> MakeResult:
        """Returns the `postprocess` of a job whose output has the columns of `schema`."""
        is_listed = job.task.reads_pairs and pa.types.is_nested(schema.field(job.answer_column).type)
        return cls(job.answer_column, job.task.answers, reported(job), is_listed)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns of the output. The writer drops columns that are not in its schema."""
        names = answer_names(self.answers, self.output_column)
        result = {**row[columns.INPUT], **{own: row[name] for name, own in names.items()}}
        if row.get(columns.OUTPUTS) is not None:  # The job asks for several sequences, so no column has this name.
            result[columns.OUTPUTS] = [one["text"] for one in row[columns.OUTPUTS]]
        if self.are_scores_listed and not isinstance(row[columns.SCORE], list):
            result[self.output_column] = [row[columns.SCORE]]
        return {**result, **{name: row[name] for name in self.reported}}


def answer_names(answers: Sequence[str], output_column: str) -> dict[str, str]:
    """Returns the columns that a task adds to a row, with the name of each in the output.

    Args:
        answers: The columns; the first is the answer.
        output_column: Name of the answer in the output. The column of scales is named after it.
    """
    scale = {columns.EMBEDDING_SCALE: f"{output_column}_scale"}
    return {name: scale.get(name, name) for name in answers} | {answers[0]: output_column}
