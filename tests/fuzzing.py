"""Values of all types for the fuzzers, which are marked `soak`, and the checks that they share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from millrace.engine.errors import MillraceError, UserError
from millrace.engine.llm import LLM
from running import one

__all__ = ["ANYTHING", "JSON", "TEXT", "check_error", "check_serves", "fuzz", "only_user_errors"]

MAX_EXAMPLES = int(os.environ.get("MILLRACE_FUZZ_EXAMPLES", "1000"))
"""Number of examples of each fuzzer."""

MAX_ERROR_CHARS = 1500
"""Longest message of an error; a wrong value is quoted shortly."""

fuzz = settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

TEXT = st.text(st.characters(codec=None), max_size=20)
"""Texts with any code points, halves of surrogate pairs included."""

HUGE = st.just(4400).map(lambda exponent: 10**exponent)
"""An integer that Python refuses to write as text."""

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2**31, 2**40, 2**63, 10**30, -(2**31), 1e-320, 1e308])
    | st.integers(-(10**6), 10**6)
    | HUGE
    | st.floats()
    | TEXT
    | st.sampled_from(["", "auto", "float32", "x" * 5000, "\0", "../../x", "[" * 3000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
"""Values that JSON text can hold, those that Python's reader adds included."""

ANYTHING = st.recursive(
    JSON
    | st.binary(max_size=5)
    | st.sampled_from([np.zeros(2), np.array(5), np.zeros((2, 2)), np.array(["a", "b"]), np.array([], dtype=object)])
    | st.sampled_from([np.int64(3), np.uint64(2**63 + 5), np.float16("nan"), np.str_("x"), np.bool_(True)])
    | st.sampled_from([object(), {1}, range(3), 1j, int, Ellipsis]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXT | st.integers() | HUGE, inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=6,
)
"""Values of all types that a caller may give for an argument."""


@contextlib.contextmanager
def only_user_errors() -> Iterator[None]:
    """Lets user errors pass if their messages are short; any other error fails the test."""
    try:
        yield
    except UserError as error:
        if len(str(error)) >= MAX_ERROR_CHARS:
            raise AssertionError(f"{len(str(error))} characters: {error}") from error


def check_serves(llm: LLM, expected: list[int]) -> None:
    """Checks that an engine is idle and answers a plain prompt with the tokens that it gave before."""
    assert not llm.llm_engine.has_unfinished_requests()
    llm.llm_engine.check_integrity()
    assert one(llm, max_tokens=4).token_ids == expected


def check_error(error: Any) -> None:
    """Checks that the error of one prompt names a class of the user's errors, and is short."""
    assert isinstance(error.to_exception(), MillraceError), error
    assert error.kind != "ModelExecutionError" and len(error.message) < MAX_ERROR_CHARS, error
