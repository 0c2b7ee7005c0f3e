"""What our pydantic models share: unknown keys name the nearest known one, and no pydantic error reaches the user."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..engine.errors import ConfigError, unknown_key_message


class Settings(BaseModel):
    """Base of every config: immutable, refuses unknown keys, and raises `ConfigError` with a line per problem."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(_describe(type(self), one) for one in error.errors())) from None


def _describe(model: type[BaseModel], problem: Any) -> str:
    """Says one problem in one line that begins with the field."""
    place = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("function-", "lax-or-")))
    if problem["type"] == "extra_forbidden":
        return unknown_key_message(model.__name__, str(problem["loc"][-1]), model.model_fields)
    if problem["type"] == "missing":
        return f"{model.__name__}.{place} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem.get("ctx", {}).get("error"), ConfigError) and "\n" not in message:
        return message if place in message or not place else f"{model.__name__}.{place}: {message}"
    return f"{model.__name__}.{place}: {message[:1].lower()}{message[1:]}; got {problem['input']!r:.100}"
