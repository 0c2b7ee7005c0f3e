"""Reads the prompt of a row, as text or as token ids, and raises if the row has none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...engine.errors import PromptTypeError
from .. import columns


def checked_prompt(row: Mapping[str, Any]) -> str:
    """Returns the prompt of a row as text.

    Args:
        row: The columns of the row.

    Returns:
        The text. It may be empty; the engine then raises an error.

    Raises:
        PromptTypeError: The row has no prompt, or its prompt is not text.
    """
    prompt = row.get(columns.PROMPT)
    if isinstance(prompt, str):
        return prompt
    if columns.PROMPT not in row:
        raise PromptTypeError(
            f"the row has no column {columns.PROMPT!r} or {columns.MESSAGES!r} to make a prompt of; its columns are: "
            f"{', '.join(map(str, row)) or 'none'}"
        )
    if prompt is None or (isinstance(prompt, float | np.floating) and math.isnan(prompt)):
        raise PromptTypeError(f"column {columns.PROMPT!r} is missing its value (got {prompt!r}); it must be text")
    raise PromptTypeError(f"column {columns.PROMPT!r} must be text; got {type(prompt).__name__} {prompt!r:.80}")


def checked_token_ids(row: Mapping[str, Any]) -> list[int] | None:
    """Returns the prompt of a row as token ids; None if the row has no token ids.

    Args:
        row: The columns of the row.

    Returns:
        A list of Python integers, even if the row holds an array.

    Raises:
        PromptTypeError: The value is not a list of integers.
    """
    given = row.get(columns.TOKENIZED_PROMPT)
    if given is None:
        return None
    ids = given.tolist() if isinstance(given, np.ndarray) else given
    if not isinstance(ids, list | tuple) or not all(_is_integer(token_id) for token_id in ids):
        raise PromptTypeError(
            f"column {columns.TOKENIZED_PROMPT!r} must be a list of token ids (integers); "
            f"got {type(given).__name__} {given!r:.80}"
        )
    return [int(token_id) for token_id in ids]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
