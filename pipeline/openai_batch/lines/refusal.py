"""How the readers of a line give it up, to be caught by `RequestReader`."""

from __future__ import annotations

from typing import Any

from .fields import Kind
from .line_error import LineError


class Refusal(Exception):  # noqa: N818  # never leaves the package: it becomes a `LineError`
    """A line that is no request, found while it is read.

    Attributes:
        error: What is wrong.
    """

    def __init__(self, code: str, message: str, param: str | None = None, status: int | None = 400) -> None:
        super().__init__(message)
        self.error = LineError(code, message, param, status)


def check_kind(value: Any, kind: Kind, place: str) -> None:
    """Checks the type of a value.

    Args:
        value: The value.
        kind: What it must be.
        place: Where it stands.

    Raises:
        Refusal: It is of another type.
    """
    if not kind.matches(value):
        raise Refusal("invalid_type", f"{place} must be {kind.words}; got {value!r:.80}", place)
