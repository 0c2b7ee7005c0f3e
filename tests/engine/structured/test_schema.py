"""Schemas as pydantic makes them compile, and hold as far as a grammar can say them."""

from __future__ import annotations

import enum
import json
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from millrace.engine.errors import SamplingParamsError
from millrace.engine.structured.grammar_text import check_compiles
from millrace.engine.structured.params import StructuredOutputsParams
from millrace.engine.structured.schema import fit_schema

pydantic = pytest.importorskip("pydantic")


class Colour(enum.Enum):
    RED = "red"
    DARK_BLUE = "dark-blue"


class Everything(pydantic.BaseModel):
    """The kinds of fields for which pydantic writes keywords that llguidance lacks."""

    names: set[str]
    pairs: dict[Literal["a", "b c"], int]
    colours: dict[Colour, float]
    by_length: dict[Annotated[str, pydantic.StringConstraints(min_length=2, max_length=3)], int]
    by_id: dict[uuid.UUID, int]
    place: Path
    secret: pydantic.SecretStr
    data: bytes
    any_value: Any
    parsed: pydantic.Json[int]


def test_a_model_of_pydantic_compiles_and_what_is_not_enforced_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check_compiles(StructuredOutputsParams(json=Everything))
    assert "no grammar can enforce propertyNames and uniqueItems" in caplog.text


@pytest.mark.parametrize("schema", [True, "true", {}, {"properties": {"a": True, "b": False}, "items": True}])
def test_a_schema_may_be_a_truth_value(schema: Any) -> None:
    check_compiles(StructuredOutputsParams(json=schema))


def test_a_schema_that_allows_no_value_is_refused() -> None:
    with pytest.raises(SamplingParamsError, match="the schema is false, which allows no value"):
        check_compiles(StructuredOutputsParams(json=False))


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ({"enum": ["a", "b-c"]}, r"^(a|b\-c)$"),
        ({"const": "a.b", "title": "x"}, r"^a\.b$"),
        ({"pattern": "^x", "type": "string"}, "^x"),
        ({"minLength": 1}, "^.{1,}$"),
        ({"$ref": "#/$defs/Key"}, "^(k)$"),
    ],
)
def test_names_of_properties_follow_a_pattern(names: dict[str, Any], pattern: str) -> None:
    asked = {"type": "object", "propertyNames": names, "$defs": {"Key": {"enum": ["k"]}}}
    fitted, lost = fit_schema({**asked, "additionalProperties": {"type": "integer"}})
    assert fitted["patternProperties"] == {pattern: {"type": "integer"}}
    assert (fitted["additionalProperties"], lost) == (False, [])
    check_compiles(StructuredOutputsParams(json=fitted))


def test_names_chosen_by_the_author_and_values_are_no_keywords() -> None:
    names = {"format": {"type": "string"}, "uniqueItems": {"type": "string"}, "propertyNames": {"enum": ["x"]}}
    schema = {"properties": names, "$defs": names, "enum": [{"format": "x", "uniqueItems": True}], "format": "uuid"}
    assert fit_schema(schema) == (schema, [])


def test_a_schema_of_the_caller_is_not_changed() -> None:
    schema = {"items": {"format": "binary"}, "uniqueItems": True}
    before = json.dumps(schema)
    assert fit_schema(schema) == ({"items": {}}, ["uniqueItems"])
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "names",
    [{"enum": 5}, {"enum": "ab"}, {"const": 5}, {"pattern": [1]}, {"minLength": "a"}, {"maxLength": True}],
    ids=str,
)
def test_names_of_a_wrong_type_are_refused(names):
    schema = {"type": "object", "propertyNames": names}
    with pytest.raises(SamplingParamsError, match=f"propertyNames has the {next(iter(names))}"):
        check_compiles(StructuredOutputsParams(json=schema))


@pytest.mark.parametrize("defined", [[1], 5, None, "a", {"other": {}}], ids=str)
def test_names_that_are_defined_nowhere_are_lost_or_refused(defined):
    schema = {"type": "object", "propertyNames": {"$ref": "#/$defs/name"}, "$defs": defined}
    assert fit_schema(schema)[1] == ["propertyNames"]


@pytest.mark.parametrize(
    "number", [2**53 + 1, 1234567890123456789, 2**64, -(2**53) - 1, 10**400 + 1, 123456789.12345678]
)
@pytest.mark.parametrize("keyword", ["const", "enum"])
def test_a_number_whose_digits_would_change_is_refused(number: float, keyword: str) -> None:
    value = {"id": [number]} if keyword == "const" else [1, number]
    with pytest.raises((SamplingParamsError, ValueError), match="digits") as caught:
        fit_schema({"properties": {"a": {keyword: value}}})
    assert len(str(caught.value)) < 300


def test_numbers_that_keep_their_digits_are_left_as_they_are() -> None:
    schema = {
        "enum": [2**53, -(2**60), 10**25, 0.1, 1e22, -0.0, 3, True, None, "9007199254740993"],
        "default": 2**53 + 1,
    }
    assert fit_schema(schema) == (schema, [])


@pytest.mark.parametrize(
    ("limits", "fitted"),
    [
        ({"minimum": 0, "maximum": 2**53}, {"minimum": 0, "maximum": 2**53}),
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, {"minimum": 1024 - 2**63, "maximum": 2**63 - 1024}),
        ({"exclusiveMinimum": 2**53 + 1}, {"exclusiveMinimum": 2**53 + 2}),
        ({"exclusiveMaximum": 2**64}, {"exclusiveMaximum": 2**63 - 1024}),
        ({"minimum": 2**63 - 3000}, {"minimum": 2**63 - 2048}),
    ],
)
def test_a_limit_is_moved_to_the_next_number_that_float64_holds(limits: dict[str, int], fitted: dict[str, int]) -> None:
    assert fit_schema({"type": "integer", **limits}) == ({"type": "integer", **fitted}, [])


def test_limits_that_leave_only_longer_integers_are_refused() -> None:
    with pytest.raises(SamplingParamsError, match=r"structured_outputs.json .* more than 64 bits"):
        check_compiles(StructuredOutputsParams(json={"type": "integer", "minimum": 2**63}))
