"""`read_json`: reads a JSON file of a model's folder; whatever is wrong with the file is a `CheckpointError`."""

from __future__ import annotations

import json
from typing import Any

from ..errors import CheckpointError, quote
from .location import Location

__all__ = ["read_json", "read_json_object"]


def read_json(file: Location) -> Any:
    """Returns the value that a JSON file holds; None if the file does not exist.

    Raises:
        CheckpointError: The file cannot be read, is no UTF-8 or no JSON, or is nested too deep.
    """
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON: {error!s:.200}; the file is damaged, fetch it again"
        ) from error


def read_json_object(file: Location) -> dict[str, Any]:
    """Returns the object that a JSON file holds; an empty one if the file does not exist.

    Raises:
        CheckpointError: As in `read_json`; or the file holds something else.
    """
    content = read_json(file)
    if not isinstance(content, dict | None):
        raise CheckpointError(
            f"{file} must hold a JSON object; it holds a {type(content).__name__}, {quote(content)}; fetch it again"
        )
    return content or {}
