"""`Refusal`: the exception with which the parsers of a line reject it; `RequestReader` catches it."""

from __future__ import annotations

from typing import Any

from .fields import Kind
from .line_error import LineError


class Refusal(Exception):  # noqa: N818  # it never leaves the package: `RequestReader` returns its `LineError`
    """Raised while a line is parsed, when the line is not a valid request.

    Attributes:
        error: The error of the line, without its `custom_id`.
    """

    def __init__(self, code: str, message: str, param: str | None = None, status: int | None = 400) -> None:
        super().__init__(message)
        self.error = LineError(code, message, param, status)


def check_kind(value: Any, kind: Kind, place: str) -> None:
    """Checks the type of a value.

    Args:
        value: Value from the line.
        kind: Type that the value must have.
        place: Path of the value in the body, e.g. ``"messages[0].role"``.

    Raises:
        Refusal: The value is of another type.
    """
    if not kind.matches(value):
        raise Refusal("invalid_type", f"{place} must be {kind.words}; got {value!r:.80}", place)
