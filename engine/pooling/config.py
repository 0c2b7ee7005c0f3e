"""`PoolerConfig`: how a pooling engine makes vectors of a prompt, unless a request sets it otherwise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from typing import Any

from ..errors import ConfigError, PoolingParamsError, quote, unknown_key_message
from .params import OLDER_NAMES, PoolingParams, newer_name

__all__ = ["POOLING_TYPES", "TOKEN_POOLING_TYPES", "PoolerConfig"]

POOLING_TYPES = ("CLS", "MAX", "MEAN", "MEAN_SQRT_LEN", "WEIGHTEDMEAN", "LAST")
"""What makes the vector of a prompt: the hidden state of its first token, the largest value of each element, the mean,
the sum divided by the root of the number of tokens, the mean in which token i (from 1) weighs i, and the hidden state
of its last token. The vectors of several types are joined in the order in which they are named."""

TOKEN_POOLING_TYPES = ("ALL", "STEP")
"""Which tokens get a vector, where each has one of its own: all, or those of `step_tag_id`."""


@dataclass(frozen=True, slots=True)
class PoolerConfig:
    """Settings of the pooler of an engine. A setting that is None is read from the model's folder.

    Attributes:
        pooling_type: Names out of `POOLING_TYPES` that make the vector of a prompt: one, or a list. The names of
            `TOKEN_POOLING_TYPES` set `tok_pooling_type`.
        tok_pooling_type: ``"ALL"`` for a vector of each token, ``"STEP"`` for those of the token `step_tag_id` only.
        task: The task of requests that name none.
        use_activation: As in `PoolingParams`.
        dimensions: As in `PoolingParams`.
        enable_chunked_processing: Whether a prompt that is longer than the engine's `max_model_len` is run in parts, of
            which the mean is taken. The model does not see across their edges. The pooling must be ``"MEAN"``.
        max_embed_len: Most tokens of such a prompt; None for no limit.
        logit_mean: Number that is subtracted from the logits of classes.
        logit_sigma: Number by which they are then divided, before the activation.
        step_tag_id: As in `PoolingParams`.
        returned_token_ids: As in `PoolingParams`.

    The argument `seq_pooling_type` is another name of `pooling_type`; `normalize`, `softmax` and `activation` are older
    names of `use_activation`.

    Raises:
        ConfigError: A value is wrong.
    """

    pooling_type: tuple[str, ...] | str | None = None
    use_activation: bool | None = None
    dimensions: int | None = None
    tok_pooling_type: str | None = None
    task: str | None = None
    enable_chunked_processing: bool | None = None
    max_embed_len: int | None = None
    logit_mean: float | None = None
    logit_sigma: float | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    seq_pooling_type: InitVar[str | None] = None
    normalize: InitVar[bool | None] = None
    softmax: InitVar[bool | None] = None
    activation: InitVar[bool | None] = None

    def __post_init__(
        self, seq_pooling_type: str | None, normalize: bool | None, softmax: bool | None, activation: bool | None
    ) -> None:
        self._set_pooling_types(seq_pooling_type)
        names = ("dimensions", "task", "step_tag_id", "returned_token_ids")
        older = dict(zip(OLDER_NAMES, (normalize, softmax, activation), strict=True))
        try:
            use_activation = newer_name("pooler_config", self.use_activation, older)
            params = PoolingParams(use_activation=use_activation, **{name: getattr(self, name) for name in names})
        except PoolingParamsError as error:
            raise ConfigError(f"pooler_config: {error}") from error
        for name in ("use_activation", *names):
            object.__setattr__(self, name, getattr(params, name))
        self._check_chunks()
        for name in ("logit_mean", "logit_sigma"):
            _check_number(name, getattr(self, name))
        if self.logit_sigma == 0:
            raise ConfigError("pooler_config: logit_sigma must not be 0, because logits are divided by it")

    def _set_pooling_types(self, seq_pooling_type: Any) -> None:
        """Gives the pooling types the forms that the fields have, whichever names they were given under."""
        of_prompt = _types("pooling_type", self.pooling_type, (*POOLING_TYPES, *TOKEN_POOLING_TYPES))
        of_tokens = _types("tok_pooling_type", self.tok_pooling_type, TOKEN_POOLING_TYPES)
        if of_prompt and any(name in TOKEN_POOLING_TYPES for name in of_prompt):
            if of_tokens not in (None, of_prompt) or len(of_prompt) > 1:
                raise ConfigError(f"pooler_config: pooling_type={quote(of_prompt)} is for tokens; keep one such type")
            of_prompt, of_tokens = None, of_prompt
        named = _types("seq_pooling_type", seq_pooling_type, POOLING_TYPES)
        if None not in (named, of_prompt) and named != of_prompt:
            raise ConfigError("pooler_config: seq_pooling_type and pooling_type differ; they are one thing, keep one")
        object.__setattr__(self, "pooling_type", named or of_prompt)
        object.__setattr__(self, "tok_pooling_type", of_tokens[0] if of_tokens else None)

    def _check_chunks(self) -> None:
        if not isinstance(self.enable_chunked_processing, bool | None):
            given = quote(self.enable_chunked_processing)
            raise ConfigError(f"pooler_config: enable_chunked_processing must be True, False or None; got {given}")
        most = self.max_embed_len
        if most is not None and (type(most) is not int or most < 1):
            raise ConfigError(f"pooler_config: max_embed_len must be an integer of at least 1; got {quote(most)}")
        if most is not None and not self.enable_chunked_processing:
            raise ConfigError("pooler_config: max_embed_len needs enable_chunked_processing=True")

    @property
    def types(self) -> tuple[str, ...]:
        """The pooling types of a prompt, in the order in which their vectors are joined; none if they are left open."""
        assert not isinstance(self.pooling_type, str)
        return self.pooling_type or ()

    @property
    def pools_tokens(self) -> bool:
        """Whether the settings ask for a vector of each token and for nothing else."""
        by_name = self.task is not None and self.task.startswith("token_")
        return by_name or (self.task is None and self.tok_pooling_type is not None and self.pooling_type is None)

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
        known = {*(field.name for field in dataclasses.fields(cls)), "seq_pooling_type", *OLDER_NAMES}
        for key in given:
            if key not in known:
                raise ConfigError(unknown_key_message("pooler_config", key, known))
        return cls(**{key: value for key, value in given.items() if value is not None})

    def over(self, model: PoolerConfig) -> PoolerConfig:
        """Returns a config with these settings; settings that are None here are taken from `model`."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return replace(model, **own)


def _types(field: str, given: Any, allowed: Sequence[str]) -> tuple[str, ...] | None:
    """Returns names of pooling types in the order given, which is that of joined vectors; None for None."""
    if given is None:
        return None
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else [given]
    upper = [name.upper() if isinstance(name, str) else name for name in names]
    wrong = [name for name in upper if name not in allowed]
    if wrong or not upper:
        shown = quote(wrong[0] if wrong else given)
        raise ConfigError(f"pooler_config: {field}={shown} is not there; it can be {', '.join(allowed)}")
    return tuple(upper)


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not is_number:
        raise ConfigError(f"pooler_config: {name} must be a finite number; got {quote(value)}")
