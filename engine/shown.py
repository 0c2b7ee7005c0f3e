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

_HTTP_USER = re.compile(r"(https?:/{1,2})[^/\s?#'\"]+(?=@)", re.IGNORECASE)
_PASSWORD = re.compile(r"(:/{1,2})[^/\s?#'\"@:]*:[^/\s?#'\"]*(?=@)")
_ODD_PASSWORD = re.compile(r"(:/{1,2})[^/\s?#'\"@:]*:(?!\d+(?:[/?#\s]|$))[^\s\"]*(?=@)")
"""A password with a slash or another sign that ought to be escaped, as keys of AWS have; a port is none."""
_QUERY = re.compile(
    r"([?&;#][^=&;\s#'\"]*(?:key|token|secret|sig|passw|pwd|auth|credential|jwt)[^=&;\s#'\"]*=)[^&;\s#'\"]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b(bearer|basic)(\s+)[\w.~+/=-]{6,}", re.IGNORECASE)
_NAMED = re.compile(
    r"(\b(?:x[\w-]*-)?(?:api[_-]?key|(?:auth|access|hf)[_-]?token|authorization|(?:set-)?cookie|password|passphrase"
    r"|client[_-]?secret)(?:['\"]\s*:\s*['\"]|\s*=\s*['\"]?|:\s+(?=(?:token|api-?key|bearer|basic)\s|[^\s'\",;]*\d)))"
    r"((?:\w+\s+)?)[^\s'\",;&#]+",
    re.IGNORECASE,
)
"""A header or a setting in a text: a name, and its value in quotes, after a sign of equality or with a digit."""
_NAMES = re.compile(
    r"^token$|(?:hf|hub|hugging_?face|git_?lab|auth|access|api|bearer|session|security|refresh|client|sas|\bid|_id)"
    r"[_-]?token|secret|passw|passphrase|pwd|credential|jwt|connection[_-]?string"
    r"|(?:^|[_-])dsn$|(?:api|access|account|private)[_-]?key|authorization|^(?:set-)?cookie|^headers(?:\.|$)",
    re.IGNORECASE,
)


def is_secret_name(name: Any) -> bool:
    """Returns whether a setting, a header or a variable of this name holds a secret."""
    return isinstance(name, str) and _NAMES.search(name) is not None


def has_user(url: str) -> bool:
    """Returns whether a URL holds a user, or a user and a password."""
    return any(place.search(url) for place in (_HTTP_USER, _PASSWORD, _ODD_PASSWORD))


def without_secrets(value: Any) -> Any:
    """Returns a value of texts, numbers, lists and mappings with `HIDDEN` in place of the secrets in it.

    Args:
        value: A text such as a message or a URL, or values that hold texts. Other values are returned as they are.
    """
    if isinstance(value, str):
        for place in (_HTTP_USER, _PASSWORD, _ODD_PASSWORD, _QUERY):
            value = place.sub(rf"\1{HIDDEN}", value)
        for place in (_HEADER, _NAMED):
            value = place.sub(rf"\1\2{HIDDEN}", value)
        return value
    if isinstance(value, Mapping):
        return {name: _hide(one) if is_secret_name(name) else without_secrets(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_secrets(one) for one in value)
    return value


def _hide(value: Any) -> Any:
    return value if value is None or isinstance(value, bool) else HIDDEN
