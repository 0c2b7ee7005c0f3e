"""`StageConfig`: the settings that every stage has, which users give as a bool, a dict or a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import Field, field_validator

from ...engine.errors import ConfigError
from ..settings import Settings

AnyStageConfig = TypeVar("AnyStageConfig", bound="StageConfig")


class StageConfig(Settings):
    """Settings that every stage has. A setting of None takes the value of the processor, except `batch_size`.

    Attributes:
        enabled: Whether the stage runs.
        model_source: Folder of the model whose tokenizer the stage uses.
        concurrency: Number of processes of the operator in which the stage runs, fixed or as (min, max).
        num_cpus: CPUs of one of these processes.
        memory: Memory of one of these processes, in bytes.
        runtime_env: Ray runtime environment of the operator.
        batch_size: Most rows that the stage gets in one call; None for all rows of a row block.
    """

    enabled: bool = True
    model_source: str | None = None
    concurrency: int | tuple[int, int] | None = None
    num_cpus: float | None = Field(default=None, gt=0)
    memory: float | None = Field(default=None, gt=0)
    runtime_env: dict[str, Any] | None = None
    batch_size: int | None = Field(default=None, gt=0)

    @field_validator("concurrency", mode="before")
    @classmethod
    def _read_concurrency(cls, value: Any) -> Any:
        return None if value is None else read_concurrency(value)


def read_stage(value: Any, kind: type[AnyStageConfig], field: str) -> AnyStageConfig:
    """Returns the settings of a stage as a config, from a bool (on or off), a dict of settings, or a config.

    Args:
        value: Value of the field, from the user.
        kind: Class of the settings.
        field: Name of the field of the processor's config, for messages.

    Raises:
        ConfigError: The value is of another type, or a setting cannot be used.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, bool):
        return kind(enabled=value)
    if isinstance(value, Mapping):
        return kind(**value)
    raise ConfigError(f"{field} must be a bool, a dict or a {kind.__name__}; got {type(value).__name__} {value!r:.80}")


def read_concurrency(value: Any) -> int | tuple[int, int]:
    """Returns a number of processes, or (min, max), from any form that Ray Data LLM accepts.

    Raises:
        ConfigError: The value is neither a number nor a pair of numbers.
    """
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ConfigError(f"concurrency must be a positive integer or (min, max); got {value!r}")
        low, high = (_positive_int(one) for one in value)
        if low > high:
            raise ConfigError(f"concurrency must have min at most max; got min > max in {value!r}")
        return low, high
    return _positive_int(value)


def _positive_int(value: Any) -> int:
    try:
        number = int(float(value)) if not isinstance(value, bool) and float(value) == int(float(value)) else 0
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ConfigError(f"concurrency must be a positive integer or (min, max) of them; got {value!r}")
    return number
