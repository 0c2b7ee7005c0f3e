"""`Template`: prompt text with {column} fields.

A template reads like `str.format`, but a field is always the plain name of a column. Attributes, indices, conversions
and format specifications are refused, so a template from an untrusted source can only quote the row.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from string import Formatter
from typing import Any

from ...engine.errors import ConfigError, PromptTypeError, unknown_key_message


@dataclass(frozen=True, slots=True)
class Template:
    """A text with {column} fields, parsed, which the values of a row fill.

    Attributes:
        text: The text of the template.
        parts: Pairs of a text and the name of the column whose value follows the text; None if no value follows.
    """

    text: str
    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Returns the parsed template of a text.

        Args:
            text: Text with {column} fields; ``{{`` and ``}}`` stand for braces.

        Raises:
            ConfigError: A brace is left open, or a field is not the plain name of a column.
        """
        try:
            fields = list(Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"{error} in the template {text!r:.100}; write {{{{ and }}}} for braces") from None
        for _, name, spec, conversion in fields:
            if name is not None and (not name or spec or conversion):
                shown = f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
                raise ConfigError(
                    f"{{{shown}}} in the template is not a plain column name; write {{column}}, and {{{{ and }}}} for "
                    "braces"
                )
        return cls(text, tuple((before, name) for before, name, _, _ in fields))

    @property
    def columns(self) -> list[str]:
        """Names of the columns that the template refers to."""
        return list(dict.fromkeys(name for _, name in self.parts if name is not None))

    def check_columns(self, known: Iterable[str]) -> None:
        """Raises if the input lacks a column that the template refers to.

        Args:
            known: Names of the columns of the input.

        Raises:
            ConfigError: The input lacks a column.
        """
        names = list(known)
        for name in self.columns:
            if name not in names:
                raise ConfigError(unknown_key_message("the input", name, names).replace("field", "column", 1))

    def render(self, row: Mapping[str, Any]) -> str:
        """Returns the text of the template with the values of a row in place of the fields.

        Args:
            row: The columns of the row.

        Raises:
            PromptTypeError: A column is missing, has no value, or is bytes.
        """
        return "".join(before + ("" if name is None else _as_text(row, name)) for before, name in self.parts)


def _as_text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise PromptTypeError(f"the row has no column {name!r}; its columns are: {', '.join(map(str, row)) or 'none'}")
    value = row[name]
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, numbers.Real) and math.isnan(value)):
        raise PromptTypeError(f"column {name!r} is missing its value (got {value!r}); the prompt needs it")
    if isinstance(value, bool | numbers.Number | Decimal | date | time):
        return str(value)
    if isinstance(value, list | dict):
        return _json_text(value, name)
    raise PromptTypeError(f"column {name!r} must be text, a number or a date; got {type(value).__name__} {value!r:.80}")


def _json_text(value: Any, name: str) -> str:
    """Returns a list or an object as JSON, with dates and numbers that JSON lacks as text."""

    def text_of(part: Any) -> str:
        if isinstance(part, bytes):
            raise PromptTypeError(f"column {name!r} has bytes in a list or an object: {part!r:.80}; decode them")
        return str(part)

    return json.dumps(value, ensure_ascii=False, default=text_of)
