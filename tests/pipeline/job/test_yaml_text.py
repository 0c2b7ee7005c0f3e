"""A YAML text of a few lines cannot stand for gigabytes, and no text of any kind raises another error than ours."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engine.errors import ConfigError
from millrace.pipeline.job.yaml_text import MAX_EXPANDED_SIZE, read_yaml


def bomb(depth: int, first: str, part: str) -> str:
    """Returns a text in which each part holds the previous one nine times."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {part.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, depth)]
    return "\n".join(lines)


def test_an_alias_stands_for_its_part() -> None:
    values, lines = read_yaml("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}", "here")
    assert values == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}], "c": {"x": 1, "y": 2}}
    assert (lines["a.x"], lines["b"], lines["b.1.x"], lines["c.y"]) == (1, 2, 1, 3)


@pytest.mark.parametrize(
    "text",
    [bomb(30, "[x]", "[{}]"), bomb(30, "{x: 1}", "{{<<: [{}]}}"), bomb(5, "x" * 10_000, "[{}]")],
    ids=["lists", "merges", "long text"],
)
def test_aliases_that_stand_for_too_much_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"here:\d+: the aliases .* more than 1,000,000 values"):
        read_yaml(text, "here")


def test_fields_that_aliases_repeat_under_long_names_have_few_paths() -> None:
    names = "".join(f"{'x' * 50}{at}: {{" for at in range(20))
    text = f"a: &a [{', '.join(['1'] * 500)}]\nb: &b [{', '.join(['*a'] * 500)}]\n{names}c: *b{'}' * 20}"
    _, lines = read_yaml(text, "here")
    assert sum(map(len, lines)) < 10_000_000


def test_a_long_text_without_aliases_is_read() -> None:
    text = "x" * 2 * MAX_EXPANDED_SIZE
    assert read_yaml(f"a: {text}", "here")[0] == {"a": text}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "that holds it"),
        ("[" * 5000, "nested too deeply"),
        ("a: [1]\n" + "b: {c: " + "[" * 300, "nested too deeply"),
        ("- " * 5000 + "x", "nested too deeply"),
        ("a: 2024-13-45", "a holds a date"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("a: !!int ''", "a value cannot be read"),
        ("a: !!bool x", "a value cannot be read"),
        ("a: !!float x", "a value cannot be read"),
        ("a: !!int [1]", "not valid YAML"),
        ("limit: 1:20:30", "limit holds 1:20:30, a number to the base of 60"),
        ("a: [1:20.5]", "holds 1:20.5, a number to the base of 60"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_yaml(text, "here")
    assert len(str(caught.value)) < 400


@given(st.text(alphabet="ab:&*[]{}<>- \n!|0x.~", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        read_yaml(text, "here")
