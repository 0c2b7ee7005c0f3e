"""Templates quote columns and can do nothing else."""

from __future__ import annotations

import datetime as dt
import decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace import ConfigError
from millrace.engine.errors import PromptTypeError
from millrace.pipeline.job.template import Template


def render(text: str, **row: Any) -> str:
    return Template.parse(text).render(row)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a{b}", "a{b}"),
        (3, "3"),
        (1.5, "1.5"),
        (True, "True"),
        (decimal.Decimal("1.20"), "1.20"),
        (dt.date(2024, 3, 4), "2024-03-04"),
        ([1, "é"], '[1, "é"]'),
        ({"a": None}, '{"a": null}'),
    ],
)
def test_values_are_quoted_as_text(value: Any, shown: str) -> None:
    assert render("<{x}>", x=value) == f"<{shown}>"


def test_braces_are_doubled() -> None:
    assert render('{{"line": "{x}"}}', x="y") == '{"line": "y"}'


@pytest.mark.parametrize("name", ["two words", "a-b", "Zahl", "1"])
def test_any_plain_name_is_a_column(name: str) -> None:
    assert Template.parse(f"{{{name}}}").render({name: "v"}) == "v"


@pytest.mark.parametrize("text", ["{x!r}", "{x:>10}", "{}", "{x", "x}", "{x:{y}}"])
def test_a_field_that_is_no_plain_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="braces"):
        Template.parse(text)


@pytest.mark.parametrize("text", ["{x.__class__}", "{x[0]}"])
def test_attributes_and_items_are_never_reached(text: str) -> None:
    with pytest.raises(PromptTypeError, match="no column"):
        render(text, x="value")


@pytest.mark.parametrize("value", [None, float("nan"), b"x", object(), [b"x"], {"a": [{"b": b"x"}]}])
def test_a_value_that_is_none_is_the_rows_error(value: Any) -> None:
    with pytest.raises(PromptTypeError, match="column 'x'"):
        render("{x}", x=value)


def test_a_column_that_the_input_lacks_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="the input has no column 'lin'; did you mean 'line'"):
        Template.parse("{line} {lin}").check_columns(["line", "id"])


@given(st.text())
def test_a_text_with_doubled_braces_is_itself(text: str) -> None:
    assert render(text.replace("{", "{{").replace("}", "}}")) == text
