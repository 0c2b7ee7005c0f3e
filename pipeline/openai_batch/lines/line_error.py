"""`LineError`: the reason that a line has no answer, in the codes of OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....engine.errors import UserError


class BatchLineError(UserError):
    """Raised by `AskLine` for a line of a batch file that is invalid or repeats an earlier `custom_id`."""


@dataclass(frozen=True, slots=True)
class LineError:
    """The reason that a line has no answer.

    Attributes:
        code: Error code for programs, e.g. ``"unknown_parameter"``.
        message: Text for people: the given value, the allowed values, and what to do.
        param: Path of the field at fault, e.g. ``"messages[0].content"``; None if no field is at fault.
        status: HTTP status that a server would have answered with; None if the line is not a request at all.
        custom_id: The `custom_id` of the line; None if it could not be read.
    """

    code: str
    message: str
    param: str | None = None
    status: int | None = 400
    custom_id: str | None = None

    def as_body(self) -> dict[str, Any]:
        """Returns the body with which OpenAI's server would have reported the error."""
        kind = "server_error" if self.status == SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def as_error(self, line: int | None) -> dict[str, Any]:
        """Returns the error in the shape of the API's `BatchError`.

        Args:
            line: Number of the line in the batch file, from 1.
        """
        return {"code": self.code, "message": self.message, "param": self.param, "line": line}


SERVER_ERROR = 500
NOT_FOUND = 404

CODES: dict[str, tuple[str, str | None]] = {
    "PromptTooLongError": ("context_length_exceeded", None),
    "EmptyPromptError": ("invalid_value", None),
    "ChatTemplateError": ("invalid_value", "messages"),
    "TokenOutOfVocabularyError": ("invalid_value", None),
    "PromptTypeError": ("invalid_type", None),
    "SamplingParamsError": ("invalid_value", None),
    "PoolingParamsError": ("invalid_value", "dimensions"),
    "AdapterError": ("model_not_found", "model"),
}
"""Class name of an error that the content of a request causes -> (code, param) of its `LineError`."""


def error_of_run(kind: str, message: str, custom_id: str | None) -> LineError:
    """Returns the error of a valid line whose request failed while it ran.

    Args:
        kind: Class name of the error. A name in `CODES` is a fault of the request; all others become `server_error`.
        message: Message of the error.
        custom_id: The `custom_id` of the line.
    """
    if kind in CODES:
        code, param = CODES[kind]
        return LineError(code, message, param, NOT_FOUND if code == "model_not_found" else 400, custom_id)
    return LineError("server_error", message, None, SERVER_ERROR, custom_id)


def duplicate_error(custom_id: str | None) -> LineError:
    """Returns the error of a line that repeats the `custom_id` of an earlier line."""
    message = f"custom_id {custom_id!r} stands in an earlier line, which counts; give every line its own"
    return LineError("duplicate_custom_id", message, "custom_id", None, custom_id)
