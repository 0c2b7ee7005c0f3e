"""Functions that read one field of a `quantization_config` each, and check its value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import UnsupportedModelError, quote

__all__ = [
    "check_fields",
    "check_kv_cache",
    "flag",
    "group_size",
    "module_names",
    "one_of",
    "refuse_set",
    "unsupported",
]

ADVICE = "use another checkpoint of the model, or the unquantised one with quantization='int8' or 'fp8'"


def unsupported(field: str, value: Any, allowed: str) -> UnsupportedModelError:
    """Returns the error about a field with a value that is not implemented; `allowed` says which ones are."""
    return UnsupportedModelError(
        f"config field 'quantization_config.{field}' is {quote(value)}; it can be {allowed}; {ADVICE}"
    )


def one_of(config: Mapping[str, Any], field: str, allowed: Sequence[Any], default: Any = None) -> Any:
    """Returns a field that must have one of the implemented values; text in any case."""
    value = config.get(field, default)
    found = value.lower() if isinstance(value, str) else value
    if not any(type(found) is type(each) and found == each for each in allowed):
        raise unsupported(field, value, " or ".join(map(str, allowed)))
    return found


def flag(config: Mapping[str, Any], field: str, *, default: bool) -> bool:
    """Returns a field that must be true or false."""
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise unsupported(field, value, "true or false")
    return value


def group_size(config: Mapping[str, Any], field: str = "group_size") -> int:
    """Returns the number of neighbouring columns that share a scale; 0 for all columns, which configs write as -1."""
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not (value == -1 or value > 0):
        raise unsupported(field, value, "-1 or a positive integer")
    return max(value, 0)


def check_fields(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises if a config has a field, other than `quant_method`, that is not known: it may change the numbers."""
    for field, value in config.items():
        if field not in known and field != "quant_method":
            raise unsupported(field, value, f"absent: known fields are {', '.join(known)}")


def module_names(config: Mapping[str, Any], *fields: str) -> list[str]:
    """Returns the names of modules in fields that must be lists of names, absent or null."""
    names: list[str] = []
    for field in fields:
        value = config.get(field) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise unsupported(field, value, "a list of names of modules")
        names += value
    return names


def check_kv_cache(config: Mapping[str, Any]) -> None:
    """Raises unless the scales of a KV cache, which checkpoints may have, are those of 8-bit floats."""
    scheme = config.get("kv_cache_scheme")
    fields = scheme if isinstance(scheme, Mapping) else {}
    if scheme not in (None, "static") and (fields.get("num_bits"), fields.get("type")) != (8, "float"):
        raise unsupported("kv_cache_scheme", scheme, "null, static, or of 8-bit floats")


def refuse_set(config: Mapping[str, Any], *fields: str) -> None:
    """Raises if one of the fields, each of which would change the numbers, is set."""
    for field in fields:
        if config.get(field):
            raise unsupported(field, config[field], "absent or null")
