"""The user's functions: `preprocess` adds columns to a row first, `postprocess` replaces the row at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engine.errors import ConfigError, unknown_key_message
from .base import Row, Stage

RowFunction = Callable[..., Mapping[str, Any]]

ARGUMENT_KWARGS = ("fn_args", "fn_kwargs")
MAP_KWARGS = frozenset(
    {"accelerator_type", "compute", "concurrency", "label_selector", "memory", "num_cpus"}
    | {"num_gpus", "resources", "runtime_env", *ARGUMENT_KWARGS}
)


class PreprocessStage(Stage):
    """A stage that merges the columns that the user's function returns into the row.

    Args:
        function: Function of a copy of the row.
        fn_args: Further positional arguments of the function.
        fn_kwargs: Further keyword arguments of the function.
    """

    name = "preprocess"

    def __init__(
        self, function: RowFunction, fn_args: Sequence[Any] = (), fn_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._function, self._args, self._kwargs = function, fn_args, fn_kwargs or {}

    def process(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the result of the user's function, which may change the copy of the row that it gets."""
        return self._function(dict(row), *self._args, **self._kwargs)


class PostprocessStage(PreprocessStage):
    """A stage that replaces the row by the columns that the user's function returns."""

    name = "postprocess"

    def merge(self, row: Row, columns: Mapping[str, Any]) -> None:
        """Replaces all columns of the row by the returned columns."""
        row.data = dict(columns)


@dataclass(frozen=True)
class UserFunction:
    """A function of the user, and the resources of the operator that it runs in.

    Attributes:
        kind: Class of the stage that calls the function.
        function: Function of a row; None if the user gave none.
        map_kwargs: Arguments of the function (`fn_args`, `fn_kwargs`) and resources of the operator, under the names of
            `Dataset.map`.
    """

    kind: type[PreprocessStage]
    function: RowFunction | None = None
    map_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.function is not None and not callable(self.function):
            raise ConfigError(f"{self.kind.name} must be a function of a row; got {type(self.function).__name__}")
        for key in self.map_kwargs:
            if key not in MAP_KWARGS:
                raise ConfigError(unknown_key_message(f"{self.kind.name}_map_kwargs", key, MAP_KWARGS))

    @property
    def resources(self) -> dict[str, Any]:
        """Resources of the operator, as arguments of `Dataset.map_batches`."""
        return {key: value for key, value in self.map_kwargs.items() if key not in ARGUMENT_KWARGS}

    def stages(self) -> list[Stage]:
        """Returns the stage that calls the function; an empty list if there is no function."""
        if self.function is None:
            return []
        arguments = {key: value for key, value in self.map_kwargs.items() if key in ARGUMENT_KWARGS}
        return [self.kind(self.function, **arguments)]
