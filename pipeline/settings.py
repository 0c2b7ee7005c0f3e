"""`Settings`: the base of the configs, pydantic models that raise `ConfigError` in place of pydantic's errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from ..engine.errors import ConfigError, quote, unknown_key_message
from ..engine.shown import without_secrets

MAX_PROBLEMS = 5
"""Most problems of a config that its error describes."""

MAX_CHARS = 1200
"""Most characters of these descriptions together."""

MAX_NAME_CHARS = 60
"""Most characters of a name in the path of a field that an error shows."""


class Settings(BaseModel):
    """The base of every config. It refuses unknown keys, and raises `ConfigError` with a line per problem.

    A config is immutable, because its fields are checked together; `replace` returns a changed copy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = error.errors()
            lines = [_describe(type(self), one) for one in problems[:MAX_PROBLEMS]]
            lines = [_shortened(line, MAX_CHARS // len(lines)) for line in lines]
            if len(problems) > MAX_PROBLEMS:
                lines.append(f"{type(self).__name__}: there are {len(problems) - MAX_PROBLEMS} more problems")
            raise ConfigError("\n".join(lines)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a truth value for a number, also in a list or dict of numbers: pydantic would take it for 0 or 1."""
        given = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) for one in given) and info.field_name is not None:
            kinds = list(_kinds(cls.model_fields[info.field_name].annotation))
            if (int in kinds or float in kinds) and bool not in kinds:
                raise ValueError("input should be a number")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise ConfigError(f"a {type(self).__name__} does not change; use config.replace({name}={value!r:.60})")
        super().__setattr__(name, value)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yields what the text of the config shows of its fields."""
        for name, value in super().__repr_args__():
            yield name, without_secrets({name: value})[name]

    def replace(self, **changes: Any) -> Self:
        """Returns a checked copy with some fields changed.

        Args:
            **changes: Field name -> new value.

        Raises:
            ConfigError: A field is unknown, or its value cannot be used.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **changes})


def _shortened(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yields the types that an annotation is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _describe(model: type[BaseModel], problem: Any) -> str:
    """Returns a line that describes a problem of pydantic and begins with the field."""
    place = ".".join(
        str(part)[:MAX_NAME_CHARS] for part in problem["loc"] if not str(part).startswith(("function-", "lax-or-"))
    )
    if problem["type"] == "extra_forbidden":
        return unknown_key_message(model.__name__, str(problem["loc"][-1]), model.model_fields)
    if problem["type"] == "missing":
        return f"{model.__name__}.{place} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem.get("ctx", {}).get("error"), ConfigError) and "\n" not in message:
        return message if place in message or not place else f"{model.__name__}.{place}: {message}"
    shown = without_secrets({place: problem["input"]})[place]
    return f"{model.__name__}.{place}: {message[:1].lower()}{message[1:]}; got {quote(shown, 100)}"
