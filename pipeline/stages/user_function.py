"""The user's own functions at both ends: `preprocess` adds columns to a row, `postprocess` says what it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .base import Row, Stage

RowFunction = Callable[..., Mapping[str, Any]]


class PreprocessStage(Stage):
    """Merges what the user's function returns into the row.

    Args:
        function: Called with a copy of the row.
        fn_args: Further positional arguments of the function.
        fn_kwargs: Further keyword arguments of the function.
        stop_on_error: Whether the first failed row stops the job.
    """

    name = "preprocess"

    def __init__(
        self,
        function: RowFunction,
        fn_args: Sequence[Any] = (),
        fn_kwargs: Mapping[str, Any] | None = None,
        *,
        stop_on_error: bool = False,
    ) -> None:
        super().__init__(stop_on_error=stop_on_error)
        self._function, self._args, self._kwargs = function, fn_args, fn_kwargs or {}

    def process(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Calls the user's function; its row is a copy, so that it may change it."""
        return self._function(dict(row), *self._args, **self._kwargs)


class PostprocessStage(PreprocessStage):
    """Replaces the row by what the user's function returns."""

    name = "postprocess"

    def merge(self, row: Row, columns: Mapping[str, Any]) -> None:
        """Makes the returned columns the whole row."""
        row.data = dict(columns)
