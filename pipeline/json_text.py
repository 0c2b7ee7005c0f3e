"""Values of Arrow tables as JSON."""

from __future__ import annotations

import base64
import json
import math
from typing import Any


def to_json(value: Any) -> str:
    """Returns a value as JSON text.

    Bytes become base64; dates and other types that JSON lacks become their text; numbers that JSON lacks (NaN and the
    infinities) become null.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_plain)


def json_cell(value: Any) -> Any:
    """Returns a value that was read from JSON, as text that `value_of_cell` reads. Text that is no JSON is itself."""
    if value is None:
        return None
    try:
        is_itself = isinstance(value, str) and value_of_cell(value) is value
        text = value if is_itself else json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # Half of a surrogate pair, which JSON can write and UTF-8 cannot.
        return json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        return value
    return text


def value_of_cell(cell: Any) -> Any:
    """Returns the value of JSON text; text that is no JSON, and what is no text, is itself."""
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        return cell


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    parts = getattr(value, "parts", None)  # Of an `ArrowValue`.
    return str(value) if parts is None else _finite(parts)
