"""A line as a row of the pipeline: what it asks, what becomes of the answer, what is said when there is none."""

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
"""Column that holds the request between asking and answering."""

RESULT_SCHEMA = pa.schema([(LINE, pa.binary())])
"""What a row becomes: a line of the out file."""

NO_PROMPT = dict.fromkeys((
    columns.MESSAGES, columns.PROMPT, columns.TOKENIZED_PROMPT, columns.TOOLS, columns.CHAT_TEMPLATE_KWARGS,
    columns.MODEL,
))  # fmt: skip


@dataclass(frozen=True)
class AskLine:
    """The `preprocess` of a batch: what a line asks the model.

    Attributes:
        reader: Reads the line.
    """

    reader: RequestReader

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns that the stages read.

        Raises:
            BatchLineError: The line is no request, or repeats an earlier line's `custom_id`.
        """
        request = self.reader.read(row[LINE])
        if row[IS_DUPLICATE]:
            request = duplicate_error(request.custom_id)
        if isinstance(request, LineError):
            raise BatchLineError(request.message)
        return {**NO_PROMPT, **request.columns, REQUEST: request}


@dataclass(frozen=True)
class AnswerLine:
    """The `postprocess` of a batch: the line of the out file.

    Attributes:
        fingerprint: Of the model and its settings.
    """

    fingerprint: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the line."""
        return {LINE: answer_line(row[REQUEST], row, int(time.time()), self.fingerprint)}


def error_of_row(row: Mapping[str, Any], reader: RequestReader) -> LineError:
    """Returns what is wrong with a line that became a dead letter.

    A line that is no request is read again for it: what is wrong with it follows from the line.

    Args:
        row: The dead letter.
        reader: What read the line.
    """
    request = reader.read(row[LINE])
    if row[IS_DUPLICATE]:
        return duplicate_error(request.custom_id)
    if isinstance(request, LineError):
        return request
    return error_of_run(row[columns.ERROR_KIND], row[columns.ERROR_MESSAGE], request.custom_id)
