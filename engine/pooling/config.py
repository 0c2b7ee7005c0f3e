"""`PoolerConfig`: how a pooling engine makes a vector of a prompt, unless a request sets it otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, PoolingParamsError, quote, unknown_key_message
from .params import PoolingParams

__all__ = ["POOLING_TYPES", "PoolerConfig"]

POOLING_TYPES = ("LAST", "MEAN", "CLS", "MAX")
"""The hidden states of a prompt that make its vector: that of the last token, which attends to the whole prompt; the
mean of all; that of the first token; the largest value of each element."""

NAMES_OF_VLLM = {"seq_pooling_type": "pooling_type", "normalize": "use_activation"}


@dataclass(frozen=True, slots=True)
class PoolerConfig:
    """Settings of the pooler of an engine. A setting that is None is read from the model's folder.

    Attributes:
        pooling_type: ``"LAST"`` takes the hidden state of the prompt's last token, ``"CLS"`` that of the first,
            ``"MEAN"`` the mean over its tokens, ``"MAX"`` the largest value of each element.
        use_activation: As in `PoolingParams`.
        dimensions: As in `PoolingParams`.

    Raises:
        ConfigError: A value is wrong.
    """

    pooling_type: str | None = None
    use_activation: bool | None = None
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.pooling_type is not None:
            name = self.pooling_type.upper() if isinstance(self.pooling_type, str) else self.pooling_type
            if not isinstance(name, str) or name not in POOLING_TYPES:
                allowed = ", ".join(POOLING_TYPES)
                raise ConfigError(f"pooler_config: pooling_type={quote(name)} is not there; it can be {allowed}")
            object.__setattr__(self, "pooling_type", name)
        try:
            PoolingParams(dimensions=self.dimensions, use_activation=self.use_activation)
        except PoolingParamsError as error:
            raise ConfigError(f"pooler_config: {error}") from error

    @classmethod
    def read(cls, given: Any) -> PoolerConfig:
        """Converts the value of `EngineConfig.pooler_config` to a `PoolerConfig`; vLLM's names are known too.

        Args:
            given: Value of the field: None, a mapping, or a `PoolerConfig`.

        Raises:
            ConfigError: The value has another type, or a setting is unknown or wrong.
        """
        if given is None or isinstance(given, cls):
            return given or cls()
        if not isinstance(given, Mapping):
            raise ConfigError(f"pooler_config must be a dict of settings; got {quote(given)}")
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in given.items():
            name = NAMES_OF_VLLM.get(key, key)
            if name not in known:
                raise ConfigError(unknown_key_message("pooler_config", key, known))
            if value is not None:
                values[name] = value
        return cls(**values)

    def over(self, model: PoolerConfig) -> PoolerConfig:
        """Returns a config with these settings; settings that are None here are taken from `model`."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return replace(model, **own)
