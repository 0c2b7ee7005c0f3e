"""`parse_tool_calls`: finds the tool calls in a text, in the format of each family, and returns them in OpenAI's form.

All families are parsed in one way: the text around the calls is the answer. A call that cannot be read stays in the
answer as it was written, with the reason beside it. No text raises an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

Call = tuple[str, str]
"""Name of a function, and its arguments as JSON text."""


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """The format of the tool calls of a family of models.

    Attributes:
        passage: Pattern of a passage with calls. Its group `calls` is the text that `read` gets.
        read: Function that returns the calls of a passage, or raises `ValueError` if it holds no calls.
        marks: Marks that detokenizing must keep in the text, although some tokenizers treat them as special tokens.
        id_prefix: The beginning of a call's id.
        id_length: Number of letters after the prefix.
    """

    passage: re.Pattern[str]
    read: Callable[[str], list[Call]]
    marks: tuple[str, ...]
    id_prefix: str = "call_"
    id_length: int = 24


@dataclass(slots=True)
class ParsedText:
    """The tool calls of a text, and the rest of the text.

    Attributes:
        content: The text without the calls; None if the text holds only calls. A text without calls is unchanged.
        tool_calls: The calls, each in the form of OpenAI's API.
        error: The reason why passages that are marked as calls are still in the content; None if there are none.
    """

    content: str | None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def parse_tool_calls(kind: ToolCallFormat, text: str, key: str = "") -> ParsedText:
    """Finds the tool calls in a text, and returns them with the rest of the text.

    Args:
        kind: Format of the tool calls of the model's family.
        text: The model's text.
        key: The prompt that the text answers. The id of a call is a hash of `key`, `text` and the index of the call, so
            that a rerun of the row gives the same id, and calls of different turns have different ids.
    """
    calls: list[Call] = []
    left, problems, end = [], [], 0
    for passage in kind.passage.finditer(text):
        try:
            calls += kind.read(passage["calls"].strip())
        except (ValueError, RecursionError) as error:
            problems.append(str(error))
        else:
            left.append(text[end : passage.start()])
            end = passage.end()
    if not calls:
        return ParsedText(text, [], "; ".join(problems) or None)
    content = "".join([*left, text[end:]]).strip()
    made = [_openai_call(_call_id(kind, key, text, index), *call) for index, call in enumerate(calls)]
    return ParsedText(content or None, made, "; ".join(problems) or None)


def _openai_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_id(kind: ToolCallFormat, key: str, text: str, index: int) -> str:
    told_from_others = "\0".join([key, text, str(index)]).encode("utf-8", "surrogatepass")
    return kind.id_prefix + hashlib.blake2b(told_from_others, digest_size=16).hexdigest()[: kind.id_length]


def _read_one(text: str) -> list[Call]:
    """Parses one call, written as ``{"name": ..., "arguments": {...}}``, and returns a list of it."""
    return [_checked(_decoded(text))]


def _read_several(text: str) -> list[Call]:
    """Parses calls that are written as ``{"name": ..., "parameters": {...}}`` with semicolons between them."""
    return [_checked(value) for value in _values(text, ";")]


NAMED_CALL = re.compile(r"(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?P<arguments>\{.*)", re.DOTALL)


def _read_list_or_named(text: str) -> list[Call]:
    """Parses a JSON list of calls, or one call as ``name[ARGS]{...}``, the form of newer Mistral tokenizers."""
    if text.startswith("["):
        return [_checked(value) for value in _decoded(text)]
    named = NAMED_CALL.fullmatch(text)
    if named is None:
        raise ValueError(f"a call is a JSON list, or a name and arguments; got {text!r:.80}")
    return [_checked({"name": named["name"], "arguments": _decoded(named["arguments"])})]


def _checked(value: Any) -> Call:
    """Returns the name and the arguments of a decoded call; raises `ValueError` if one is missing or invalid."""
    name = value.get("name") if isinstance(value, Mapping) else None
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"a call is a JSON object with a 'name'; got {value!r:.80}")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _decoded(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {name!r:.40} must be a JSON object; got {arguments!r:.80}")
    return name, _json_text(arguments)


def _json_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # The text holds half of a surrogate pair, which only an escape can express.
        return json.dumps(value)
    return text


def _decoded(text: str) -> Any:
    values = list(_values(text))
    if not values:
        raise ValueError("a call is empty")
    return values[0]


def _values(text: str, separator: str = "") -> Iterator[Any]:
    """Yields the JSON values of a text, which `separator` separates; raises `ValueError` for any other text between."""
    place = 0
    while place < len(text):
        try:
            value, place = DECODER.raw_decode(text, place)
        except ValueError as error:
            raise ValueError(f"{error}: {text!r:.80}") from None
        yield value
        rest = text[place:].lstrip()
        if rest and not (separator and rest.startswith(separator)):
            raise ValueError(f"a call ends before {rest!r:.40}: {text!r:.80}")
        text, place = rest.removeprefix(separator).lstrip(), 0


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)

IN_TAGS = ToolCallFormat(
    # The last call of a text that reached its limit of tokens has no closing tag.
    re.compile(r"<tool_call>(?P<calls>.*?)(?:</tool_call>|\Z)", re.DOTALL),
    _read_one,
    ("<tool_call>", "</tool_call>"),
)
JSON_ALONE = ToolCallFormat(
    # The calls are the whole text, or the text after the tag. JSON without a name is part of the answer.
    re.compile(r'(?:\A|<\|python_tag\|>)\s*(?P<calls>\{(?=.*"name"\s*:).*)\Z', re.DOTALL),
    _read_several,
    ("<|python_tag|>",),
)
AFTER_A_MARK = ToolCallFormat(
    re.compile(r"\[TOOL_CALLS\](?P<calls>.*?)(?=\[TOOL_CALLS\]|\Z)", re.DOTALL),
    _read_list_or_named,
    ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    # Templates of this family refuse ids of another shape.
    id_prefix="",
    id_length=9,
)

JSON_LIST = ToolCallFormat(re.compile(r"\A(?P<calls>\[.*)\Z", re.DOTALL), _read_list_or_named, ())
"""The form of calls in an answer that a constraint allows to hold only calls; no family writes it by itself."""

TOOL_CALL_FORMATS = {
    "hermes": IN_TAGS,
    "qwen": IN_TAGS,
    "llama3_json": JSON_ALONE,
    "mistral": AFTER_A_MARK,
}
"""Name of a parser -> the format that it reads."""
