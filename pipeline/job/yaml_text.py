"""`read_yaml`: reads the YAML of job files, price tables and settings as plain values, with the line of each field.

YAML reads some words as values that no field takes, and as names: a bare `yes`, `null`, `0x10` or `2024-01-01`. These
are refused with their place, because a user who writes them most often means text.

An alias stands for a whole part of the document, so that a few lines can stand for gigabytes of values. The size of the
document with all aliases expanded is computed before any value is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from ...engine.errors import ConfigError

TAG = "tag:yaml.org,2002:"
ODD_KINDS = {"timestamp": "a date", "binary": "bytes", "set": "a set", "omap": "an ordered map", "pairs": "pairs"}
"""Kinds of values that YAML has and a job does not: the end of the tag -> words for people."""

MAX_EXPANDED_SIZE = 1_000_000
"""Most values and characters that the aliases of a YAML text may stand for, beside the text itself."""

MAX_FLOW_LEVELS = 200
"""Most brackets and braces around a value. The reader of YAML takes time with the square of their number."""

MAX_PATH_CHARS = 200
MAX_PATHS = 100_000
"""Longest path of a field whose line is kept, and most such paths: aliases can make a short text have millions."""

NUMBERED = "logit_bias"
"""The field whose own fields have numbers as names: the ids of tokens."""


class _Loader(yaml.SafeLoader):
    """A loader of YAML that stops where brackets are nested too deeply."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803  # the name is that of the library
        if self.flow_level >= MAX_FLOW_LEVELS:
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)


def read_yaml(text: str, place: str, *, is_file: bool = True) -> tuple[Any, dict[str, int]]:
    """Reads a YAML document.

    Args:
        text: The document.
        place: The file, variable or option that holds the text, for messages.
        is_file: Whether messages name a line.

    Returns:
        The value, and the dotted path of each field with its line, counted from 1. Of millions of fields, or where
        names are very long, some are left out.

    Raises:
        ConfigError: The text is not YAML, its aliases stand for too much, the name of a field is not text or is there
            twice, or a value is of a kind that a job has no use for. The message begins with the place.
    """

    def refuse(problem: str, line: int | None) -> ConfigError:
        return ConfigError(f"{place}{f':{line}' if is_file and line is not None else ''}: {problem}")

    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _check_size(node, MAX_EXPANDED_SIZE + 2 * len(text), refuse)
        for problem, line in _problems(node):
            raise refuse(problem, line)
        lines = dict(itertools.islice(_field_lines(node), MAX_PATHS))
        return loader.construct_document(node), lines
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise refuse(f"not valid YAML: {problem}", None if mark is None else mark.line + 1) from error
    except RecursionError:
        raise refuse("the fields are nested too deeply", None) from None
    # A number with thousands of digits, or a tag such as !!int before a text that is no such value.
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise refuse(f"a value cannot be read: {error!s:.200}", None) from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_size(root: yaml.Node, limit: int, refuse: Callable[[str, int], ConfigError]) -> None:
    """Raises if the document with all aliases expanded has more than `limit` values and characters."""
    sizes: dict[int, int | None] = {}

    def measure(node: yaml.Node) -> int:
        line = node.start_mark.line + 1
        known = sizes.get(id(node), 0)
        if known is None:
            raise refuse("an alias stands for a part that holds it", line)
        if known:
            return known
        sizes[id(node)] = None
        size = 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else sum(map(measure, _children(node))))
        if size > limit:
            raise refuse(
                f"the aliases from here on stand for more than {MAX_EXPANDED_SIZE:,} values; write out what is meant",
                line,
            )
        sizes[id(node)] = size
        return size

    measure(root)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _problems(node: yaml.Node, name: str = "") -> Iterator[tuple[str, int]]:
    """Yields what is wrong with a value or inside it, and the line."""
    line = node.start_mark.line + 1
    kind = node.tag.removeprefix(TAG)
    if kind in ODD_KINDS:
        shown = f" {node.value}" if isinstance(node, yaml.ScalarNode) else ""
        yield f"{name or 'the text'} holds {ODD_KINDS[kind]}{shown:.100}; write it in quotes if it is text", line
    elif kind in ("int", "float") and ":" in node.value:  # YAML 1.1 reads 1:20:30 as 4830.
        yield (
            f"{name or 'the text'} holds {node.value:.100}, a number to the base of 60; write it in quotes or out",
            line,
        )
    elif isinstance(node, yaml.MappingNode):
        yield from _problems_of_names(node, name)
        for key, value in node.value:
            yield from _problems(value, f"{key.value!s:.100}")
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _problems(value, name)


def _problems_of_names(node: yaml.MappingNode, name: str) -> Iterator[tuple[str, int]]:
    kinds = {"str", "merge", "int"} if name == NUMBERED else {"str", "merge"}
    inside = f" in {name}" if name else ""
    known: set[str] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            if key.tag.removeprefix(TAG) not in kinds:
                yield (
                    f"the name of a field{inside} is text; got {key.value:.100}; write it in quotes if it is a name",
                    line,
                )
            if key.value in known and key.value != "<<":
                yield f"the field {key.value!r:.100} is there twice", line
            known.add(key.value)


def _field_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields the dotted path of every field, except very long paths, and its line."""
    if len(prefix) > MAX_PATH_CHARS:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _field_lines(value, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1
            yield from _field_lines(value, f"{prefix}{index}.")
