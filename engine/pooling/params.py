"""`PoolingParams`: how the vectors of a prompt are made.

Names are the same as in vLLM. The constructor checks the values. `Task.check_pooling` checks them against the model
when a request is added.
"""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from ..errors import PoolingParamsError, quote, unknown_key_message

__all__ = ["CUT_TO_LIMIT", "OLDER_NAMES", "POOLING_TASKS", "PoolingParams", "newer_name"]

POOLING_TASKS = ("embed", "token_embed", "classify", "token_classify")
"""Names of the pooling tasks: an embedding of the prompt or of each token, classes of the prompt or of each token."""

OLDER_NAMES = ("normalize", "softmax", "activation")
"""Names that `use_activation` once had in vLLM."""

MAX_INTEGER = 2**31 - 1

CUT_TO_LIMIT = -1
"""The value of `truncate_prompt_tokens` that stands for the model's own limit."""


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """Parameters of one pooling request.

    Attributes:
        task: ``"embed"`` or ``"classify"`` for one vector of the prompt, ``"token_embed"`` or ``"token_classify"`` for
            one of each token; the engine must do it. None for the task of the engine.
        dimensions: Number of leading elements of an embedding to keep, for models that were trained for shorter
            embeddings; None for all. The embedding is shortened before it is normalised.
        use_activation: Whether embeddings are scaled to length 1 and logits are turned into probabilities; None for the
            setting of the engine, which is True unless the model or `PoolerConfig` sets it to False.
        truncate_prompt_tokens: Number of tokens, special tokens included, that a longer prompt is cut to; -1 for the
            limit of the model. The special tokens at the end of a text stay. None to refuse a prompt that is too long.
        step_tag_id: Token id. Of the vectors of all tokens, only those of this token are returned.
        returned_token_ids: Numbers of the classes whose logits are returned, of a vector for each token.
        skip_reading_prefix_cache: Whether all tokens of the prompt are computed, also those whose keys and values are
            in the prefix cache.
        requires_token_ids: Accepted for the sake of vLLM's scripts. The engine always knows the token ids.

    The arguments `normalize`, `softmax` and `activation` are older names of `use_activation`.

    Raises:
        PoolingParamsError: A value is wrong.
    """

    task: str | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    normalize: InitVar[bool | None] = None
    softmax: InitVar[bool | None] = None
    activation: InitVar[bool | None] = None
    truncate_prompt_tokens: int | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    skip_reading_prefix_cache: bool | None = None
    requires_token_ids: bool = False

    def __post_init__(self, normalize: bool | None, softmax: bool | None, activation: bool | None) -> None:
        if self.task is not None and not (isinstance(self.task, str) and self.task in POOLING_TASKS):
            raise _wrong("task", self.task, f"one of {', '.join(map(repr, POOLING_TASKS))}")
        older = dict(zip(OLDER_NAMES, (normalize, softmax, activation), strict=True))
        object.__setattr__(self, "use_activation", newer_name("pooling_params", self.use_activation, older))
        for name in ("use_activation", "skip_reading_prefix_cache", "requires_token_ids"):
            if not isinstance(getattr(self, name), bool | None):
                raise _wrong(name, getattr(self, name), "True, False or None")
        for name, smallest in (("dimensions", 1), ("step_tag_id", 0)):
            object.__setattr__(self, name, _integer(name, getattr(self, name), smallest))
        cut = _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, CUT_TO_LIMIT)
        if cut == 0:
            raise _wrong("truncate_prompt_tokens", cut, "an integer of at least 1, or -1 for the limit of the model")
        object.__setattr__(self, "truncate_prompt_tokens", cut)
        object.__setattr__(self, "returned_token_ids", _ids(self.returned_token_ids))

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


FIELD_NAMES = frozenset((*(field.name for field in dataclasses.fields(PoolingParams)), *OLDER_NAMES))


def newer_name(what: str, value: Any, older: Mapping[str, Any]) -> Any:
    """Returns the value of `use_activation`, which may be given under an older name; warns of such a name.

    Args:
        what: Name of the object with the fields, for messages.
        value: Value of `use_activation` itself.
        older: Older name -> value.

    Raises:
        PoolingParamsError: A value is no bool, or two names have different values.
    """
    for name, given in older.items():
        if given is None:
            continue
        if not isinstance(given, bool):
            raise _wrong(name, given, "True, False or None")
        if value not in (None, given):
            raise PoolingParamsError(f"{name} and use_activation differ; they are two names of one thing, keep one")
        # Python shows such a warning once for each place in a script, however many rows bring the name.
        warnings.warn(f"{what}: {name} is an older name; use use_activation={given}", FutureWarning, stacklevel=4)
        value = given
    return value


def _integer(name: str, value: Any, smallest: int) -> int | None:
    """Returns `value` as an int, or None for None. Datasets may hold numpy's integers and whole floats.

    Raises:
        PoolingParamsError: The value is no whole number of at least `smallest`.
    """
    if value is None:
        return None
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not smallest <= value <= MAX_INTEGER or not float(value).is_integer():
        raise _wrong(name, value, f"an integer of at least {smallest}")
    return int(value)


def _ids(values: Any) -> tuple[int, ...] | None:
    """Returns a list of numbers as a tuple of ints, or None for None; raises if it holds anything else, or nothing."""
    if values is None:
        return None
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not values or None in values:
        raise _wrong("returned_token_ids", values, "a list of integers of at least 0")
    return tuple(number for value in values if (number := _integer("returned_token_ids", value, 0)) is not None)


def _wrong(name: str, given: Any, allowed: str) -> PoolingParamsError:
    return PoolingParamsError(f"{name} must be {allowed}; got {quote(given, 80)}")
