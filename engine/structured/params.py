"""`StructuredOutputsParams`: a constraint that the output of a request must satisfy.

Names are the same as in vLLM. The constructor checks the values. `Grammars.start` compiles the constraint when a
request is added, because that needs the model's tokenizer.
"""

from __future__ import annotations

import dataclasses
import json as json_library
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SamplingParamsError, quote, unknown_key_message

__all__ = ["CONSTRAINTS", "StructuredOutputsParams"]

CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")
"""The fields that hold a constraint; exactly one of them is given."""


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """A constraint on the output of a request. Exactly one of the first five fields is given.

    Attributes:
        json: JSON schema: a dictionary, its JSON text, or a class with `model_json_schema`, such as a pydantic model.
            It is stored as text.
        regex: Regular expression that the whole output matches, in the syntax of Rust's `regex`, which has no
            look-around and no back-references; the escape for a digit means 0 to 9.
        choice: Texts; the output is one of them.
        grammar: Context-free grammar, in GBNF or in llguidance's variant of Lark, in whose expressions the escape for a
            digit means 0 to 9.
        json_object: True if the output is any JSON object.
        disable_any_whitespace: Whether JSON has no whitespace between its parts.
        disable_additional_properties: Whether objects have no properties besides those of the schema, where the schema
            does not set `additionalProperties`.
        whitespace_pattern: Regular expression for the whitespace between the parts of JSON; None for a space, or a line
            break with up to 20 blanks after it.

    Raises:
        SamplingParamsError: A value is wrong, or not exactly one of the first five fields is given.
    """

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise SamplingParamsError(
                f"structured_outputs takes exactly one of {', '.join(CONSTRAINTS)}; got {' and '.join(given) or 'none'}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        if self.json_object not in (None, True):
            raise _wrong("json_object", self.json_object, "True, or left out")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise _wrong(name, value, "a non-empty string")
        self._check_options()

    def _check_options(self) -> None:
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise SamplingParamsError(
                "structured_outputs: disable_any_whitespace and whitespace_pattern say different things; drop one"
            )
        if self.json_object and self.disable_additional_properties:
            raise SamplingParamsError(
                "structured_outputs.disable_additional_properties needs the properties of a schema; json_object has "
                "none, give json"
            )
        options = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
        for name in options if self.json is None and not self.json_object else ():
            if getattr(self, name):
                raise SamplingParamsError(f"structured_outputs.{name} is about JSON; it goes with json or json_object")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StructuredOutputsParams:
        """Makes the parameters from a mapping, such as a cell of a dataset. A field with the value None is left out.

        Args:
            values: Field name -> value.

        Returns:
            The parameters.

        Raises:
            SamplingParamsError: A field is unknown (the message gives the nearest known one), or a value is wrong.
        """
        for key in values:
            if key == "structural_tag":
                raise SamplingParamsError(
                    "structured_outputs.structural_tag is not there yet; say the whole output with grammar or regex"
                )
            if key not in FIELD_NAMES:
                raise SamplingParamsError(unknown_key_message("structured_outputs", key, FIELD_NAMES))
        return cls(**{key: value for key, value in values.items() if value is not None})


FIELD_NAMES = frozenset(field.name for field in dataclasses.fields(StructuredOutputsParams))


def _schema_text(schema: Any) -> str:
    """Returns a schema as JSON text; the properties keep their order."""
    try:
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        if isinstance(schema, str):
            schema = json_library.loads(schema)
        text = json_library.dumps(schema, ensure_ascii=False, allow_nan=False, default=_plain)
    except Exception as error:  # The class that makes a schema may raise any error.
        raise SamplingParamsError(
            f"structured_outputs.json is not JSON: {error!s:.200}; got {quote(schema, 80)}"
        ) from error
    if not isinstance(schema, Mapping | bool):
        raise _wrong("json", schema, "a JSON schema: a dictionary, its JSON text, or a pydantic model")
    return text


def _plain(value: Any) -> Any:
    """Returns a numpy array or scalar as lists and numbers, for `json.dumps`. Arrow turns lists of rows into arrays."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")


def _choices(choices: Any) -> tuple[str, ...]:
    allowed = "a list of different strings, at least one"
    if isinstance(choices, str) or not isinstance(choices, Iterable):
        raise _wrong("choice", choices, allowed)
    texts = tuple(choices)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise _wrong("choice", list(texts), allowed)
    return tuple(dict.fromkeys(texts))


def _wrong(name: str, given: Any, allowed: str) -> SamplingParamsError:
    return SamplingParamsError(f"structured_outputs.{name} must be {allowed}; got {quote(given, 80)}")
