"""`LoRARequest`: names the adapter with which a prompt is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from ..errors import ConfigError, quote
from ..shown import without_secrets

__all__ = ["LoRARequest", "LoRARequests", "check_lora_request"]


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """Names the adapter with which a prompt is run; it can be pickled.

    Attributes:
        lora_name: Name of the adapter, by which outputs and reports show it.
        lora_int_id: Number of the adapter, 1 or more; an engine takes each number for one adapter only.
        lora_path: Folder of the adapter on this machine or behind a URL, or its repository on the model hub.
        base_model_name: Name of the model that the adapter was made for; it is not used.
        load_inplace: Whether the folder is read again although an adapter of this name is known already.

    Raises:
        ConfigError: A field has a wrong type or value.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ConfigError(f"lora_name must be a text that is not empty; got {quote(self.lora_name)}")
        name, number = quote(self.lora_name), self.lora_int_id
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigError(f"lora_int_id of {name} must be an integer of 1 or more; got {quote(number)}")
        if not isinstance(self.lora_path, str | PathLike):
            raise ConfigError(f"lora_path of {name} must be a path or a text; got {quote(self.lora_path)}")
        object.__setattr__(self, "lora_path", str(self.lora_path))
        if not isinstance(self.base_model_name, str | None):
            raise ConfigError(f"base_model_name of {name} must be a text or None; got {quote(self.base_model_name)}")
        if not isinstance(self.load_inplace, bool):
            raise ConfigError(f"load_inplace of {name} must be True or False; got {quote(self.load_inplace)}")

    def __repr__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return f"LoRARequest({', '.join(f'{name}={value!r}' for name, value in without_secrets(given).items())})"

    @property
    def name(self) -> str:
        """`lora_name`, under vLLM's other name."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """`lora_int_id`, under vLLM's other name."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """`lora_path`, under vLLM's other name."""
        return self.lora_path


LoRARequests = LoRARequest | Sequence[LoRARequest | None] | None
"""The adapter of all prompts of a call, or a list with that of each prompt; None for the model alone."""


def check_lora_request(given: Any) -> LoRARequest:
    """Returns the value that a caller gave as `lora_request`.

    Raises:
        ConfigError: It is no `LoRARequest`.
    """
    if not isinstance(given, LoRARequest):
        raise ConfigError(f"lora_request must be a LoRARequest, or None for the model alone; got {quote(given)}")
    return given
