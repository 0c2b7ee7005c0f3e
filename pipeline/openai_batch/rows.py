"""A line of a batch file as a row of the pipeline: `AskLine` and `AnswerLine`, and the error of a failed row."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .. import columns
from .lines.line_error import BatchLineError, LineError, duplicate_error, error_of_run
from .lines.request import RequestReader
from .lines.response import answer_line
from .source import IS_DUPLICATE, LINE

REQUEST = "__request"
"""Column that holds the parsed request from `AskLine` to `AnswerLine`."""

RESULT_SCHEMA = pa.schema([(LINE, pa.binary())])
"""Schema of the results: each row holds a line of the out file."""

NO_PROMPT = dict.fromkeys((
    columns.MESSAGES, columns.PROMPT, columns.TOKENIZED_PROMPT, columns.TOOLS, columns.CHAT_TEMPLATE_KWARGS,
))  # fmt: skip


@dataclass(frozen=True)
class AskLine:
    """The `preprocess` function of a batch: parses a line into the columns that the stages read.

    Attributes:
        reader: The parser of lines.
    """

    reader: RequestReader

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns that the stages read, and the parsed request.

        Raises:
            BatchLineError: The line is not a valid request, or repeats the `custom_id` of an earlier line.
        """
        request = self.reader.read(row[LINE])
        if row[IS_DUPLICATE]:
            request = duplicate_error(request.custom_id)
        if isinstance(request, LineError):
            raise BatchLineError(request.message)
        adapter = self.reader.adapter_of(request.model)
        return {**NO_PROMPT, **request.columns, columns.MODEL: adapter, REQUEST: request}


@dataclass(frozen=True)
class AnswerLine:
    """The `postprocess` function of a batch: makes the line of the out file from an answered row.

    Attributes:
        fingerprint: The `system_fingerprint` of the answers: a hash of the model and its settings.
    """

    fingerprint: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the row of the results: the line of the out file in the column `LINE`."""
        return {LINE: answer_line(row[REQUEST], row, int(time.time()), self.fingerprint)}


def error_of_row(row: Mapping[str, Any], reader: RequestReader) -> LineError:
    """Returns the error of a line that became a dead letter.

    The dead letter does not hold the details of an invalid request, so the function parses the line again to find them.

    Args:
        row: The dead letter.
        reader: The reader that the run parsed its lines with.
    """
    request = reader.read(row[LINE])
    if row[IS_DUPLICATE]:
        return duplicate_error(request.custom_id)
    if isinstance(request, LineError):
        return request
    return error_of_run(row[columns.ERROR_KIND], row[columns.ERROR_MESSAGE], request.custom_id)
