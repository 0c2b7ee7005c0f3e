"""`PoolingParams`: how the vector of a prompt is made.

Names are the same as in vLLM. The constructor checks the values. `Task.check_pooling` checks them against the model
when a request is added.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PoolingParamsError, quote, unknown_key_message

__all__ = ["POOLING_TASKS", "PoolingParams"]

POOLING_TASKS = ("embed", "classify")
"""Names of the pooling tasks. vLLM has further tasks with a vector for each token, which this release does not have."""


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """Parameters of one pooling request.

    Attributes:
        task: ``"embed"`` or ``"classify"``, which must be the task of the engine; None for the task of the engine.
        dimensions: Number of leading elements of an embedding to keep, for models that were trained for shorter
            embeddings; None for all. The embedding is shortened before it is normalised.
        use_activation: Whether embeddings are scaled to length 1 and logits are turned into probabilities; None for the
            setting of the engine, which is True unless the model or `PoolerConfig` sets it to False.
        normalize: Older name of `use_activation`.
        skip_reading_prefix_cache: Whether all tokens of the prompt are computed, also those whose keys and values are
            in the prefix cache.

    Raises:
        PoolingParamsError: A value is wrong.
    """

    task: str | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    normalize: bool | None = None
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        if self.task is not None and not (isinstance(self.task, str) and self.task in POOLING_TASKS):
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
        """Makes the parameters from a mapping, such as a cell of a dataset. A field with the value None is left out.

        Args:
            values: Field name -> value.

        Returns:
            The parameters.

        Raises:
            PoolingParamsError: A field is unknown (the message gives the nearest known one), or a value is wrong.
        """
        if not isinstance(values, Mapping):
            raise PoolingParamsError(f"pooling_params must be a mapping of field names to values; got {quote(values)}")
        for key in values:
            if key not in FIELD_NAMES:
                raise PoolingParamsError(unknown_key_message("PoolingParams", key, FIELD_NAMES))
        return cls(**{key: value for key, value in values.items() if value is not None})


FIELD_NAMES = frozenset(field.name for field in dataclasses.fields(PoolingParams))


MAX_DIMENSIONS = 2**31 - 1


def _dimensions(value: Any) -> int | None:
    """Returns `value` as an int, or None for None. Datasets may hold numpy's integers and whole floats.

    Raises:
        PoolingParamsError: The value is no whole number of at least 1.
    """
    if value is None:
        return None
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 1 <= value <= MAX_DIMENSIONS or not float(value).is_integer():
        raise _wrong("dimensions", value, "an integer of at least 1")
    return int(value)


def _wrong(name: str, given: Any, allowed: str) -> PoolingParamsError:
    return PoolingParamsError(f"{name} must be {allowed}; got {quote(given, 80)}")
