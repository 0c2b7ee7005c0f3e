"""How to turn a prompt into a vector: `PoolingParams`, checked when it is made.

Names are those that users of vLLM know. What depends on the model is checked when a request is added, by
`Pooler.check`.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PoolingParamsError, unknown_key_message

__all__ = ["POOLING_TASKS", "PoolingParams"]

POOLING_TASKS = ("embed", "classify")
"""What a pooling engine may do. Vectors of single tokens are not there yet."""


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """Parameters of one request that is pooled.

    Attributes:
        task: ``"embed"`` or ``"classify"``; None for whatever the engine does.
        dimensions: Leading numbers of an embedding to keep, for models that were trained for it; None for all. It is
            cut before it is normalised.
        use_activation: Whether an embedding is scaled to length 1, and logits become probabilities; None for the
            model's own way, which is True unless it says otherwise.
        normalize: An older name of `use_activation`.
        skip_reading_prefix_cache: Whether every token is computed, also those whose KV cache is there already.

    Raises:
        PoolingParamsError: A wrong value.
    """

    task: str | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    normalize: bool | None = None
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in POOLING_TASKS:
            raise _wrong("task", self.task, " or ".join(map(repr, POOLING_TASKS)))
        for name in ("use_activation", "normalize", "skip_reading_prefix_cache"):
            if not isinstance(getattr(self, name), bool | None):
                raise _wrong(name, getattr(self, name), "True, False or None")
        if None not in (self.normalize, self.use_activation) and self.normalize != self.use_activation:
            raise PoolingParamsError("normalize and use_activation differ; they are two names of one thing, keep one")
        if self.use_activation is None:
            object.__setattr__(self, "use_activation", self.normalize)
        object.__setattr__(self, "dimensions", _dimensions(self.dimensions))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PoolingParams:
        """Makes them from a mapping, as a row of a dataset gives it; None means that a field is left out.

        Args:
            values: Field name -> value.

        Returns:
            The parameters.

        Raises:
            PoolingParamsError: An unknown field (the message names the nearest known one) or a wrong value.
        """
        for key in values:
            if key not in FIELD_NAMES:
                raise PoolingParamsError(unknown_key_message("PoolingParams", str(key), FIELD_NAMES))
        return cls(**{key: value for key, value in values.items() if value is not None})


FIELD_NAMES = frozenset(field.name for field in dataclasses.fields(PoolingParams))


def _dimensions(value: Any) -> int | None:
    """Takes numpy's integers and whole floats too: they are what a dataset's rows hold."""
    if value is None:
        return None
    is_whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value).is_integer()
    if not is_whole or value < 1:
        raise _wrong("dimensions", value, "an integer of at least 1")
    return int(value)


def _wrong(name: str, given: Any, allowed: str) -> PoolingParamsError:
    return PoolingParamsError(f"{name} must be {allowed}; got {given!r:.80}")
