"""`LoRARequest`: names the adapter with which a prompt is run."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, quote

__all__ = ["LoRARequest"]


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
        number = self.lora_int_id
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigError(
                f"lora_int_id of {quote(self.lora_name)} must be an integer of 1 or more; got {quote(number)}"
            )
