"""`compile_pattern`: a regular expression that an adapter's config holds, if it is sure to be matched in short time.

The config comes from a stranger, and Python matches some expressions in a time that is exponential in the length of the
name. Nothing else can run meanwhile, so such expressions are refused before they are tried.
"""

from __future__ import annotations

import re

from ..errors import AdapterError, quote

__all__ = ["compile_pattern"]

MAX_CHARS = 1_000
MAX_OPEN_REPEATS = 3
"""Most repetitions without an end in one pattern: the time grows with the length of a name to this power, and more."""

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[:a-zA-Z=!<P>]*|[*+?]|\{\d*(,?)\d*\}|.", re.DOTALL)


def compile_pattern(text: str) -> re.Pattern[str]:
    """Returns the expression that matches the end of a module's name, from a dot on, as PEFT's patterns do.

    Args:
        text: The key of `rank_pattern` or `alpha_pattern`.

    Raises:
        AdapterError: The text is no expression, or matching it may take too long.
    """
    if len(text) > MAX_CHARS or _may_take_long(text):
        raise AdapterError(
            f"the pattern {quote(text)} may take very long to match: a pattern can have {MAX_CHARS} characters, "
            f"{MAX_OPEN_REPEATS} repetitions (* + {{n,}}), and no repetition or alternative inside a repeated group; "
            "write out the names of the modules"
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"the pattern {quote(text)} is no regular expression: {error!s:.100}") from error


def _may_take_long(text: str) -> bool:
    """Returns whether an expression has too many repetitions, or a repeated group with a choice inside."""
    num_open, choices, closed = 0, [False], False  # Whether each open group has a choice; whether the last closed had.
    for token in _TOKEN.finditer(text):
        is_repeat = token[0] in ("*", "+") or (token[0].startswith("{") and len(token[0]) > 1)
        num_open += is_repeat
        if is_repeat and closed:
            return True
        closed = token[0] == ")" and len(choices) > 1 and choices.pop()
        if token[0].startswith("("):
            choices.append(False)
        elif is_repeat or token[0] in ("|", "?") or closed:
            choices[-1] = True
    return num_open > MAX_OPEN_REPEATS
