"""Values of Arrow tables as JSON."""

from __future__ import annotations

import base64
import json
from typing import Any


def to_json(value: Any) -> str:
    """Returns a value as JSON text. Bytes become base64; dates and other types that JSON lacks become their text."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
