"""`parse_yaml`: the values in a YAML text, with limits on what the text may expand to.

An alias stands for a whole part of the document, so that a few lines can stand for gigabytes of values. The size of the
document with all aliases expanded is computed before any value is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from ...engine.errors import ConfigError

__all__ = ["parse_yaml"]

MAX_EXPANDED_SIZE = 1_000_000
"""Most values and characters that the aliases of a YAML text may stand for, beside the text itself."""


def parse_yaml(text: str, place: str, *, is_file: bool = True) -> tuple[Any, dict[str, int]]:
    """Returns the values of a YAML text, and the line of each field.

    Args:
        text: The text.
        place: Name of the text in error messages: a file, or the setting that holds the text.
        is_file: Whether errors name a line of the text.

    Returns:
        The values, and the dotted path of each field -> its line, counted from 1.

    Raises:
        ConfigError: The text is not YAML, or is nested too deeply, or its aliases stand for too much.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _check_size(node, place, MAX_EXPANDED_SIZE + 2 * len(text))
        lines = dict(_key_lines(node))
        return loader.construct_document(node), lines
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(_describe(place, error, is_file=is_file)) from error
    except RecursionError as error:
        raise ConfigError(f"{place}: the YAML is nested too deeply") from error
    except ValueError as error:  # A value looks like a date or a number and is none.
        raise ConfigError(f"{place}: not valid YAML: {error!s:.200}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_size(root: yaml.Node, place: str, limit: int) -> None:
    """Raises if the document with all aliases expanded has more than `limit` values and characters."""
    sizes: dict[int, int | None] = {}

    def measure(node: yaml.Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise ConfigError(f"{place}: line {node.start_mark.line + 1}: an alias stands for a part that holds it")
        if known:
            return known
        sizes[id(node)] = None
        parts = [node.value] if isinstance(node, yaml.ScalarNode) else []
        size = 1 + sum(map(len, parts)) + sum(map(measure, _children(node)))
        if size > limit:
            raise ConfigError(
                f"{place}: line {node.start_mark.line + 1}: the aliases from here on stand for more than "
                f"{MAX_EXPANDED_SIZE:,} values; write out what is meant"
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


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields the dotted path of every field of a file, and its line, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _key_lines(value, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1
            yield from _key_lines(value, f"{prefix}{index}.")


def _describe(place: str, error: yaml.YAMLError, *, is_file: bool) -> str:
    """Returns the message of an error of the parser, with its line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    line = f":{mark.line + 1}" if is_file and mark is not None else ""
    return f"{place}{line}: not valid YAML: {problem}"
