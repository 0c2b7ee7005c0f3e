"""`without_secrets`: cleans what is shown to people or kept in files, so that no password or key is in it.

Secrets come to us in the places of URLs that hold a user, a password or a key, and under names such as `hf_token`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HIDDEN", "has_user", "is_secret_name", "without_secrets"]

HIDDEN = "***"
"""The text that is shown in place of a secret."""

_HTTP_USER = re.compile(r"(https?://)[^/\s?#'\"]+(?=@)", re.IGNORECASE)
_PASSWORD = re.compile(r"(://)[^/\s?#'\"@:]*:[^/\s?#'\"]*(?=@)")
_QUERY = re.compile(
    r"([?&;][^=&;\s#'\"]*(?:key|token|secret|sig|passw|pwd|auth|credential)[^=&;\s#'\"]*=)[^&;\s#'\"]+", re.IGNORECASE
)
_HEADER = re.compile(r"\b(bearer|basic)(\s+)[\w.~+/=-]{6,}", re.IGNORECASE)
_NAMES = re.compile(
    r"^token$|(?:hf|hub|auth|access|api|bearer|session|security|refresh|client|sas)[_-]?token|secret|passw|credential"
    r"|(?:api|access|account|private)[_-]?key|authorization|^cookie|^headers(?:\.|$)",
    re.IGNORECASE,
)


def is_secret_name(name: Any) -> bool:
    """Returns whether a setting, a header or a variable of this name holds a secret."""
    return isinstance(name, str) and _NAMES.search(name) is not None


def has_user(url: str) -> bool:
    """Returns whether a URL holds a user, or a user and a password."""
    return _HTTP_USER.search(url) is not None or _PASSWORD.search(url) is not None


def without_secrets(value: Any) -> Any:
    """Returns a value of texts, numbers, lists and mappings with `HIDDEN` in place of the secrets in it.

    Args:
        value: A text such as a message or a URL, or values that hold texts. Other values are returned as they are.
    """
    if isinstance(value, str):
        value = _PASSWORD.sub(rf"\1{HIDDEN}", _HTTP_USER.sub(rf"\1{HIDDEN}", value))
        return _HEADER.sub(rf"\1\2{HIDDEN}", _QUERY.sub(rf"\1{HIDDEN}", value))
    if isinstance(value, Mapping):
        return {name: _hide(one) if is_secret_name(name) else without_secrets(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_secrets(one) for one in value)
    return value


def _hide(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else HIDDEN
