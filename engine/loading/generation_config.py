"""`recommended_params`: reads a model's generation_config.json, with sampling parameters and end-of-sequence tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..errors import CheckpointError, ConfigError, SamplingParamsError
from ..sampling_params import SamplingParams
from ..text.tokenizer import Tokenizer
from .model_source import resolve_model

logger = logging.getLogger(__name__)

SAME_NAME = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "skip_special_tokens",
)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Reads generation_config.json.

    Args:
        folder: The model folder.

    Returns:
        The content of the file; empty if the file does not exist.

    Raises:
        CheckpointError: The file does not hold a JSON object.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; restore the file or remove it") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object; restore the file or remove it")
    return content


def recommended_params(config: EngineConfig) -> SamplingParams:
    """Returns the parameters of requests that have none: the model's recommended parameters, or our own defaults.

    Args:
        config: Settings of the engine; its `generation_config` says whether the model's recommendations are used.

    Raises:
        ConfigError: The model folder cannot be found.
        CheckpointError: generation_config.json does not hold a JSON object.
    """
    return SamplingParams.from_dict(recommended_values(config))


def recommended_values(config: EngineConfig) -> dict[str, Any]:
    """Returns name -> value of the sampling parameters that the model recommends in place of our defaults.

    The parameters are greedy if `do_sample` is false and no temperature is given. If a value is not allowed, all are
    ignored with a warning.

    Args:
        config: As in `recommended_params`, which raises the same errors.
    """
    if config.generation_config != "auto":
        return {}
    content = read_generation_config(resolve_model(config.model))
    values = {name: content[name] for name in SAME_NAME if content.get(name) is not None}
    if content.get("max_new_tokens") is not None:
        values["max_tokens"] = content["max_new_tokens"]
    if content.get("do_sample") is False and "temperature" not in values:
        values["temperature"] = 0.0
    try:
        SamplingParams.from_dict(values)
    except SamplingParamsError as error:
        logger.warning("the defaults of generation_config.json are ignored: %s", error)
        return {}
    return values


def read_eos_token_ids(tokenizer: Tokenizer | None, *configs: Mapping[str, Any]) -> list[int]:
    """Collects the end-of-sequence tokens without duplicates; the tokenizer's own comes first.

    Args:
        tokenizer: The model's tokenizer, if there is one.
        *configs: Contents of generation_config.json and config.json, whose `eos_token_id` is one id or a list.

    Raises:
        ConfigError: An `eos_token_id` is neither a token id nor a list of token ids.
    """
    found = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for config in configs:
        value = config.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token_id, int) for token_id in values):
            raise ConfigError(f"eos_token_id must be a token id or a list of them; the model's config says {value!r}")
        found += values
    return list(dict.fromkeys(found))
