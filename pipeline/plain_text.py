"""`without_controls`: text from files and servers, as it is shown on a terminal."""

from __future__ import annotations

__all__ = ["without_controls"]


def without_controls(text: str) -> str:
    """Returns a text with escapes in place of characters that a terminal obeys, such as the title and the colours.

    Args:
        text: Any text. Line ends are among these characters, so the result is one line.
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
