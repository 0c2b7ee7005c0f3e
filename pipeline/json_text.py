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


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
