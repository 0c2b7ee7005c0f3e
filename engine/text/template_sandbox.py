"""`TemplateSandbox`: the environment in which chat templates run, with limits on their work and on what they make.

A template is a program of whoever made the model, or of a row. Transformers' environment keeps it from reaching Python;
this one also keeps it from running for ever and from filling the memory. What a template does is counted in steps and
in characters, not in seconds, so that the same template and conversation always end in the same way.

Each value that a template makes is weighed when it is made: a text by its characters, a list by its elements. An
operation whose result is about as large as its operands is counted afterwards. One that can make much of little, such
as ``'a' * 10**9``, is looked at before it runs.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from jinja2 import nodes, pass_context
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["TemplateSandbox"]

MAX_STEPS = 500_000
"""Most steps of one rendering: turns of a loop, calls, operations; an operation on a long text counts as several."""

MAX_CHARS = 1 << 24
"""Most characters of one value of a template; an element of a list counts as `ELEMENT`."""

MAX_TOTAL_CHARS = 1 << 28
"""Most characters of all values that one rendering makes."""

MAX_BITS = 1 << 14
"""Most bits of an integer that a template computes."""

MAX_ARGUMENTS = 1000
"""Most arguments that a template gives to a call as ``*values``."""

STEP_CHARS = 1024
"""Number of characters that count as a step."""

ELEMENT = 16
"""Number of characters that an element of a list, or any other small value, counts as."""

SMALL_NUMBER = 64
"""A width, an indent or the like up to this number is not looked at."""

METER, PRINT, SCAN, SPREAD, TURNS = "_meter", "_print", "_scan", "_spread", "_turns"
"""Names of the filters that are put around the expressions of a template."""

SLOW = frozenset({"pprint", "striptags", "title", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"})
"""Filters that work on each word, or take a time that grows faster than their text."""

MAX_SLOW_CHARS = 1 << 14
"""Most characters that a filter of `SLOW` gets."""

SLOW_FACTOR = 64
"""Number of times that a character of such a filter, or an element of a new list, counts."""

DEEP = frozenset({"sort", "unique", "min", "max", "groupby", "dictsort"})
"""Filters that compare whole values."""

PRODUCTS = frozenset({"join", "indent", "wordwrap", "translate", "tojson"})
"""Filters and methods that put one of their texts into many places of another one."""

_NUMBER = re.compile(r"\d+")
_NESTED = re.compile(r"\{[^{}]*\{|%[^%]*\*")


class TemplateLimitError(TemplateRuntimeError):
    """A template does more, or makes more, than it may."""


class Meter:
    """Counts what one rendering does and makes."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_chars = 0
        self._weights: dict[int, tuple[Any, int]] = {}

    def count(self, num_chars: int = 0) -> None:
        """Counts one operation on `num_chars` characters."""
        self._num_steps += 1 + num_chars // STEP_CHARS
        if self._num_steps > MAX_STEPS:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS:,} steps")

    def made(self, value: Any) -> Any:
        """Counts a value that the template has made, and returns it."""
        if type(value) is str:  # Most values are texts.
            size = weight = len(value)
        else:
            size = _size(value)
            weight = size if isinstance(value, Namespace) else self.weigh(value)
        if weight > MAX_CHARS:
            self.check(weight)
        self._num_chars += size
        if self._num_chars > MAX_TOTAL_CHARS:
            raise TemplateLimitError(f"it makes values of more than {MAX_TOTAL_CHARS:,} characters")
        self.count(size)
        return value

    def check(self, num_chars: int) -> None:
        """Raises an error if a value would have too many characters."""
        if num_chars > MAX_CHARS:
            raise TemplateLimitError(f"it makes a value of more than {MAX_CHARS:,} characters")

    def weigh(self, value: Any) -> int:
        """Returns the number of characters of a value with all that it holds."""
        if type(value) is str:
            return len(value)
        if isinstance(value, Namespace):
            # A namespace can be changed after it was weighed, so lists that hold each other many times could be made.
            raise TemplateLimitError("it prints a namespace, or puts it into another value")
        if isinstance(value, dict):
            return self._weigh_all(value, [*value, *value.values()])
        if isinstance(value, list | tuple | set | frozenset):
            return self._weigh_all(value, value)
        view = getattr(value, "mapping", None) if type(value) in _VIEWS else None
        return _size(value) if view is None else self._weigh_all(value, [*view, *view.values()])

    def _weigh_all(self, value: Any, elements: Iterable[Any]) -> int:
        known = self._weights.get(id(value))
        if known is None:
            # The value is kept, so that no other one gets its id.
            self.count(len(value) * SLOW_FACTOR)
            known = (value, ELEMENT + sum(map(self.weigh, elements)))
            self._weights[id(value)] = known
        return known[1]

    def check_call(self, name: str, subject: Any, given: Iterable[Any]) -> None:
        """Counts the call of a method or a filter, and raises an error if it could make much of little.

        Args:
            name: Name of the method or the filter.
            subject: The value whose method it is, or that is filtered.
            given: The other arguments.
        """
        others = list(given)
        weight = self.weigh(subject)
        if name in SLOW:
            if weight > MAX_SLOW_CHARS:
                raise TemplateLimitError(f"it gives {name} more than {MAX_SLOW_CHARS:,} characters")
            self.count(weight * SLOW_FACTOR)
        self.count(weight * ELEMENT if name in DEEP else sum(map(_size, others), _size(subject)))
        for one in others:
            self.weigh(one)
        if not others:
            return
        numbers = [one for one in others if isinstance(one, int) and one > SMALL_NUMBER]
        if numbers:
            self.check(weight * max(numbers))
        if name == "replace" and len(others) > 1:
            self.check(weight + str(subject).count(str(others[0])) * len(str(others[1])))
        elif name in PRODUCTS:
            self.check(weight * max([1, *map(_longest_text, others)]))
            self.check(_size(subject) * max([1, *(len(one) for one in others if isinstance(one, list))]))
        elif name == "sum" and any(isinstance(one, list | tuple) for one in others):
            raise TemplateLimitError("it sums what are no numbers")

    def check_format(self, text: Any, given: Any) -> None:
        """Raises an error if a format such as ``%1000d`` or ``{:1000}`` could make much of little."""
        values = list(given.values()) if isinstance(given, dict) else list(_as_tuple(given))
        width = max([1, *(int(number[:9]) for number in _NUMBER.findall(str(text)))])
        if _NESTED.search(str(text)):
            width = max([width, *(one for one in values if isinstance(one, int))])
        weight = self.weigh(text)
        if width > SMALL_NUMBER:
            self.check(weight * width)
        heaviest = max([1, *map(self.weigh, values)])
        if weight > STEP_CHARS:
            self.check(weight * heaviest)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment of a chat template; use `metered` around a rendering.

    Args:
        original: Environment whose settings, filters and variables templates expect.
    """

    intercepted_binops = frozenset({"//", "%", "+", "*", "-", "/", "**"})

    def __init__(self, original: Any) -> None:
        extensions = [type(one) for one in original.extensions.values()]
        super().__init__(trim_blocks=original.trim_blocks, lstrip_blocks=original.lstrip_blocks, extensions=extensions)
        self._local = threading.local()
        given = {name: value for name, value in original.globals.items() if name not in ("lipsum", "range")}
        given["strftime_now"] = self._limit_strftime(original.globals["strftime_now"])
        given["namespace"] = _flat(original.globals["namespace"])
        self.globals.pop("lipsum")
        self.globals.update(given)
        self.filters = {name: self._limit(name, one) for name, one in original.filters.items()}
        self.tests = {name: self._limit_test(one) for name, one in original.tests.items()}
        self.filters |= {METER: self._on_meter, PRINT: self._on_print, SCAN: self._on_scan, TURNS: self._on_turns}
        self.filters[SPREAD] = self._on_spread

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Gives the rendering of this thread a meter of its own."""
        self._local.meter = Meter()
        try:
            yield
        finally:
            del self._local.meter

    @property
    def _meter(self) -> Meter:
        return self._local.meter

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Meters().visit(source), *args, **kwargs)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or a method for the template."""
        subject = getattr(function, "__self__", None)
        if isinstance(subject, str | bytes) and function.__name__ == "join":
            args = tuple(map(list, args))
        given = [*args, *kwargs.values()]
        if isinstance(subject, str | bytes | int):
            self._meter.check_call(function.__name__, subject, given)
        return self._meter.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes a binary operation for the template."""
        meter = self._meter
        if operator == "%" and isinstance(left, str | bytes):
            meter.check_format(left, right)
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                    meter.check(meter.weigh(value) * times)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TemplateLimitError(f"it computes an integer of more than {MAX_BITS:,} bits")
        return meter.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns the method `format` of a text in a form that a template may call; None for any other value."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def limited(*args: Any, **kwargs: Any) -> str:
            self._meter.check_format(text, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return limited

    def _limit(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a filter that counts its calls. It gets the context, so it is never run before the rendering."""

        @pass_context
        @functools.wraps(function)
        def limited(context: Context, subject: Any, *args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            if name == "format":
                self._meter.check_format(subject, given)
            else:
                subject = list(subject) if name == "join" and not isinstance(subject, str) else subject
                self._meter.check_call(name, subject, given)
            return self._meter.made(function(*_expected(function, context), subject, *args, **kwargs))

        return pass_context(limited)

    def _limit_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def limited(context: Context, *args: Any) -> Any:
            for one in args:
                self._scan(one)
            return function(*_expected(function, context), *args)

        return pass_context(limited)

    def _limit_strftime(self, function: Callable[[str], str]) -> Callable[[str], str]:
        def strftime_now(format: str) -> str:  # Templates may name the argument.
            self._meter.check_format(format, ())
            return function(format)

        return strftime_now

    def _scan(self, value: Any) -> None:
        self._meter.count(_size(value) if isinstance(value, Namespace) else self._meter.weigh(value))

    @pass_context
    def _on_meter(self, context: Context, value: Any) -> Any:
        return self._meter.made(value)

    @pass_context
    def _on_print(self, context: Context, value: Any) -> Any:
        if isinstance(value, Namespace):
            self._meter.weigh(value)
        return self._meter.made(value)

    @pass_context
    def _on_scan(self, context: Context, value: Any) -> Any:
        self._scan(value)
        return value

    @pass_context
    def _on_spread(self, context: Context, values: Any) -> Any:
        if isinstance(values, dict):
            return values
        some = list(itertools.islice(values, MAX_ARGUMENTS + 1))
        if len(some) > MAX_ARGUMENTS:
            raise TemplateLimitError(f"it calls with more than {MAX_ARGUMENTS:,} arguments")
        return some

    @pass_context
    def _on_turns(self, context: Context, values: Any) -> Iterator[Any]:
        for value in values:
            self._meter.count()
            yield value


class _Meters(NodeTransformer):
    """Puts filters that count around the expressions of a template whose work no other method sees."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filter(node.iter, TURNS)
        return node

    def visit_Call(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = cast("nodes.Expr", _filter(node.dyn_args, SPREAD))
        return node

    visit_Filter = visit_Test = visit_Call  # noqa: N815

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_filter(_as_constant(one), PRINT) for one in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if len(sides) == 2 and node.ops[0].op in ("eq", "ne") and any(isinstance(one, nodes.Const) for one in sides):
            return node  # A comparison with a short text or a number takes no time.
        node.expr = _filter(node.expr, SCAN)
        for operand in node.ops:
            operand.expr = _filter(operand.expr, SCAN)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_filter(one, PRINT) for one in node.nodes]
        return _filter(node, METER)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, METER) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, METER)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, METER) if node.ctx == "load" else node


_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


def _flat(kind: Any) -> Any:
    """Returns a class of namespaces that hold no namespaces, so that a few of them cannot stand for many."""

    class FlatNamespace(kind):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *given = args
            kind.__init__(self, *given, **kwargs)
            for value in dict(*given, **kwargs).values():
                _check_flat(value)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_flat(value)
            super().__setitem__(name, value)

    return FlatNamespace


def _check_flat(value: Any) -> None:
    if isinstance(value, Namespace):
        raise TemplateLimitError("it puts a namespace into another one")


def _size(value: Any) -> int:
    """Returns the number of characters of a value, without those of the values that it holds."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return ELEMENT + value.bit_length() // 8
    is_sized = isinstance(value, dict | list | tuple | set | frozenset | range)
    return ELEMENT * (1 + len(value)) if is_sized else ELEMENT


def _longest_text(value: Any) -> int:
    values = value.values() if isinstance(value, dict) else _as_tuple(value)
    return max((len(one) for one in values if isinstance(one, str | bytes)), default=0)


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _as_constant(node: nodes.Expr) -> nodes.Expr:
    if not isinstance(node, nodes.TemplateData):
        return node
    return nodes.Const(node.data, lineno=node.lineno, environment=node.environment)


def _expected(function: Callable[..., Any], context: Context) -> list[Any]:
    """Returns the first arguments that a filter or a test expects besides the values of the template."""
    kind = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    known = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
    return [] if kind is None else [known[kind]]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
