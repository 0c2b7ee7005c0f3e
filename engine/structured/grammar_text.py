"""`grammar_text`: a constraint as the text of a grammar that llguidance compiles; `check_compiles`: checks it.

These functions need no model, so that a job can check the constraint in its settings before it starts.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from ..errors import SamplingParamsError, quote
from .params import CONSTRAINTS, StructuredOutputsParams
from .schema import SCHEMAS_BY_NAME, VALUES, fit_schema
from .trial import find_problem

__all__ = ["cannot_compile", "check_compiles", "first_line", "grammar_text"]

logger = logging.getLogger(__name__)

WHITESPACE = r" |\n[ \t]{0,20}"
"""Whitespace between the parts of JSON if a request sets no pattern: a space, or a line break with an indentation.

The pattern is limited, because a model may otherwise generate only whitespace until its length limit.
"""


MAX_REASON_CHARS = 300
"""Most characters of the library's message that are shown; it may quote a part of the grammar."""

ESCAPE = re.compile(r"\\.", re.DOTALL)
DIGITS = {r"\d": "[0-9]", r"\D": "[^0-9]"}
"""Escapes of a regular expression that are replaced; a class in brackets may also stand inside of brackets."""

LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])*/')
"""A string, or a regular expression between slashes, of a grammar in Lark."""


def check_compiles(params: StructuredOutputsParams | None) -> None:
    """Checks that a constraint can be compiled, as far as the check is possible without a tokenizer.

    Raises:
        SamplingParamsError: The constraint cannot be compiled.
    """
    if params is not None and (problem := find_problem(grammar_text(params))) is not None:
        raise cannot_compile(params, problem)


def grammar_text(params: StructuredOutputsParams) -> str:
    """Returns the text of a constraint's grammar, in the form that llguidance compiles.

    Raises:
        SamplingParamsError: The constraint cannot be turned into a grammar.
    """
    try:
        return _library_text(params)
    except (ValueError, RecursionError) as error:
        raise cannot_compile(params, str(error)) from error


def cannot_compile(params: StructuredOutputsParams, reason: str) -> SamplingParamsError:
    """Returns the error for a constraint that cannot be compiled.

    Args:
        params: The constraint.
        reason: Error message of llguidance or of Python; only its first line of interest (`first_line`) is shown.
    """
    field = next(name for name in CONSTRAINTS if getattr(params, name) is not None)
    given = getattr(params, field)
    return SamplingParamsError(
        f"structured_outputs.{field} cannot be compiled: {first_line(reason)[:MAX_REASON_CHARS]}; got {quote(given)}"
    )


def _library_text(params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher, grammar_from

    if params.regex is not None:
        return grammar_from("regex", _with_ascii_digits(params.regex))
    if params.grammar is not None:
        return grammar_from("grammar", LITERAL.sub(_with_ascii_digits_in, params.grammar))
    if params.choice is not None:
        # A rule in capitals is one expression for the lexer, which takes many more alternatives than the parser.
        return "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, params.choice))
    schema, lost = fit_schema({"type": "object"} if params.json is None else json.loads(params.json))
    if lost:
        logger.warning("structured_outputs.json: no grammar can enforce %s; check the outputs", " and ".join(lost))
    if params.disable_additional_properties:
        _close_objects(schema)
    options: Any = {"whitespace_flexible": False}
    if not params.disable_any_whitespace:
        options = {"whitespace_pattern": params.whitespace_pattern or WHITESPACE}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def _with_ascii_digits(regex: str) -> str:
    """Returns a regular expression in which the escape for a digit means 0 to 9, as in JSON Schema."""
    return ESCAPE.sub(lambda found: DIGITS.get(found[0], found[0]), regex)


def _with_ascii_digits_in(literal: re.Match[str]) -> str:
    return _with_ascii_digits(literal[0]) if literal[0].startswith("/") else literal[0]


def _close_objects(schema: Any) -> None:
    """Sets `additionalProperties` to False in all parts of a schema that are about objects and do not set it."""
    if isinstance(schema, list):
        for part in schema:
            _close_objects(part)
    if not isinstance(schema, dict):
        return
    if "properties" in schema or "object" in _types(schema):
        schema.setdefault("additionalProperties", False)
    for name, part in schema.items():
        if name in SCHEMAS_BY_NAME and isinstance(part, dict):
            _close_objects(list(part.values()))
        elif name not in VALUES:
            _close_objects(part)


def _types(schema: dict[str, Any]) -> list[Any]:
    given = schema.get("type")
    return given if isinstance(given, list) else [given]


def first_line(text: str) -> str:
    """Returns the text after "error: " in the first line that starts so, or else the first line that is not empty.

    The messages of llguidance also quote the grammar and mark the place of the error in it.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (said or lines or ["no reason given"])[0]
