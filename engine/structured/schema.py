"""`fit_schema`: a JSON schema as pydantic makes it, in the keywords that llguidance has.

Three things are brought into that form: `format`, which is an annotation where it is unknown; `propertyNames`, which is
said with `patternProperties`; and a schema that is true or false. `uniqueItems` cannot be said in a grammar. llguidance
reads numbers as float64, so a number whose digits would change is refused, and a limit is moved to the next float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ..errors import quote

FORMATS = frozenset({
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid",
})  # fmt: skip
"""The formats that llguidance enforces."""

SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords of JSON Schema whose values map names that the author has chosen to schemas."""

VALUES = ("const", "enum", "default", "examples", "example", "required", "dependentRequired")
"""Keywords of JSON Schema whose values are JSON values or names, and not schemas."""

ANNOTATIONS = frozenset({"type", "title", "description"})
"""Keywords that say nothing about a name, which is a string in any case."""

KINDS: dict[str, type] = {"pattern": str, "const": str, "enum": list, "minLength": int, "maxLength": int}
"""Keywords for the names of an object -> the type of the value."""

LIMITS = {"minimum": math.inf, "exclusiveMinimum": math.inf, "maximum": -math.inf, "exclusiveMaximum": -math.inf}
"""Keywords that limit a number -> the direction in which fewer numbers are allowed."""

MAX_LIMIT = 2**63 - 1024
"""The largest integer of 64 bits that float64 holds."""

EXACT_DIGITS = 15
"""Significant digits that any float64 keeps."""


def fit_schema(schema: Any) -> tuple[Any, list[str]]:
    """Brings a schema into keywords that llguidance has.

    Args:
        schema: The schema, as plain JSON values.

    Returns:
        The schema in another form, and the names of the keywords that it no longer has and that an output may violate.

    Raises:
        ValueError: The schema allows no value, or holds a number that llguidance would change.
    """
    if schema is False:
        raise ValueError("the schema is false, which allows no value")
    if schema is True:
        return {}, []
    lost: set[str] = set()
    return _fit(schema, schema, lost), sorted(lost)


def _fit(part: Any, root: Mapping[str, Any], lost: set[str]) -> Any:
    if isinstance(part, list):
        return [_fit(one, root, lost) for one in part]
    if not isinstance(part, dict):
        return part
    fitted: dict[str, Any] = {}
    for name, value in part.items():
        if name in SCHEMAS_BY_NAME and isinstance(value, dict):
            fitted[name] = {key: _fit(one, root, lost) for key, one in value.items()}
        else:
            fitted[name] = value if name in VALUES else _fit(value, root, lost)
        if name in ("const", "enum", "multipleOf"):
            _check_digits(value)
        elif name in LIMITS and type(value) is int:
            fitted[name] = _inner_limit(value, LIMITS[name])
    if isinstance(fitted.get("format"), str) and fitted["format"] not in FORMATS:
        del fitted["format"]
    if fitted.pop("uniqueItems", False):
        lost.add("uniqueItems")
    return _name_properties(fitted, root, lost) if "propertyNames" in fitted else fitted


def _check_digits(value: Any) -> None:
    """Raises if a value of a schema holds a number that float64 cannot hold to the last digit."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            _check_digits(one)
    elif type(value) in (int, float) and not _keeps_digits(value):
        raise ValueError(f"the number {quote(value, 40)} would get other digits; say it with regex, or as a string")


def _keeps_digits(value: float) -> bool:
    if type(value) is int and abs(value) < 2**63:  # The library reads these without a detour through text.
        return int(float(value)) == value
    return len(Decimal(repr(value)).normalize().as_tuple().digits) <= EXACT_DIGITS if abs(value) < 1e300 else False


def _inner_limit(value: int, inward: float) -> int:
    """Returns the first integer that float64 holds, from a limit on towards the numbers that the limit allows."""
    if abs(value) >= 2**63 and (value > 0) == (inward > 0):
        raise ValueError(f"the limit {quote(value, 40)} leaves only integers of more than 64 bits; say it with regex")
    value = max(-MAX_LIMIT, min(value, MAX_LIMIT))
    near = float(value)
    is_outside = near < value if inward > 0 else near > value
    return int(math.nextafter(near, inward) if is_outside else near)


def _name_properties(part: dict[str, Any], root: Mapping[str, Any], lost: set[str]) -> dict[str, Any]:
    """Returns the schema of an object with `patternProperties` in the place of `propertyNames`."""
    names = part.pop("propertyNames")
    if isinstance(names, dict) and str(names.get("$ref")).startswith("#/$defs/"):
        defined = root.get("$defs")
        names = defined.get(names["$ref"].removeprefix("#/$defs/")) if isinstance(defined, dict) else None
    others = part.get("additionalProperties", True)
    if names is True or others is False or (isinstance(names, dict) and names.keys() <= ANNOTATIONS):
        return part
    pattern = _pattern_of(names)
    if pattern is None or "properties" in part or "patternProperties" in part:
        lost.add("propertyNames")
        return part
    return {**part, "patternProperties": {pattern: others}, "additionalProperties": False}


def _pattern_of(names: Any) -> str | None:
    """Returns the regular expression that the names of an object follow; None if their schema says it otherwise."""
    said = {name: value for name, value in names.items() if name not in ANNOTATIONS} if isinstance(names, dict) else {}
    for name, value in said.items():
        if not isinstance(value, KINDS.get(name, object)) or isinstance(value, bool):
            raise ValueError(f"propertyNames has the {name} {quote(value, 80)}, which is no {KINDS[name].__name__}")
    if said.keys() == {"pattern"}:
        return said["pattern"]
    if said.keys() == {"const"}:
        return f"^{re.escape(said['const'])}$"
    if said.keys() == {"enum"}:
        return f"^({'|'.join(re.escape(str(one)) for one in said['enum'])})$"
    if said and said.keys() <= {"minLength", "maxLength"}:
        return f"^.{{{said.get('minLength', 0)},{said.get('maxLength', '')}}}$"
    return None
