"""What is wrong with a line, in the words and codes of OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....engine.errors import UserError


class BatchLineError(UserError):
    """A line of a batch file is not a request that can be run."""


@dataclass(frozen=True, slots=True)
class LineError:
    """Why a line has no answer.

    Attributes:
        code: What programs look at, e.g. ``"unknown_parameter"``.
        message: What was given, what is allowed, what to do.
        param: The field at fault, as ``"messages[0].content"``.
        status: HTTP status that a server would have answered with; None if the line is no request at all.
        custom_id: The line's, as far as it could be read.
    """

    code: str
    message: str
    param: str | None = None
    status: int | None = 400
    custom_id: str | None = None

    def as_body(self) -> dict[str, Any]:
        """Returns the body of the server's answer."""
        kind = "server_error" if self.status == SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def as_error(self, line: int | None) -> dict[str, Any]:
        """Returns the error in the shape of the API's `BatchError`.

        Args:
            line: Number of the line, from 1.
        """
        return {"code": self.code, "message": self.message, "param": self.param, "line": line}


SERVER_ERROR = 500

CODES: dict[str, tuple[str, str | None]] = {
    "PromptTooLongError": ("context_length_exceeded", None),
    "EmptyPromptError": ("invalid_value", None),
    "ChatTemplateError": ("invalid_value", "messages"),
    "TokenOutOfVocabularyError": ("invalid_value", None),
    "PromptTypeError": ("invalid_type", None),
    "SamplingParamsError": ("invalid_value", None),
    "PoolingParamsError": ("invalid_value", "dimensions"),
}
"""Kinds of errors that a request's own content causes -> code, param."""


def error_of_run(kind: str, message: str, custom_id: str | None) -> LineError:
    """Returns the error of a line that was a request and failed on its way.

    Args:
        kind: Class name of the error.
        message: Its message.
        custom_id: The line's.
    """
    if kind in CODES:
        code, param = CODES[kind]
        return LineError(code, message, param, custom_id=custom_id)
    return LineError("server_error", message, None, SERVER_ERROR, custom_id)


def duplicate_error(custom_id: str | None) -> LineError:
    """Returns the error of a line whose `custom_id` an earlier line has."""
    message = f"custom_id {custom_id!r} stands in an earlier line, which counts; give every line its own"
    return LineError("duplicate_custom_id", message, "custom_id", None, custom_id)
