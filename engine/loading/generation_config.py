"""`recommended_params`: reads a model's generation_config.json, with sampling parameters and end-of-sequence tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..errors import CheckpointError, SamplingParamsError, quote
from ..sampling_params import SamplingParams
from ..storage import Location, read_json_object
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
    return read_json_object(Location.at(folder / "generation_config.json"))


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
    content = read_generation_config(resolve_model(config.model, config.hub))
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


def read_eos_token_ids(tokenizer: Tokenizer | None, vocab_size: int, *given: Any) -> list[int]:
    """Collects the end-of-sequence tokens without duplicates; the tokenizer's own comes first.

    Args:
        tokenizer: The model's tokenizer, if there is one.
        vocab_size: Number of tokens that the model knows; others are left out with a warning, as it never draws them.
        *given: `eos_token_id` of generation_config.json and of config.json, which is one id, a list of ids or None.

    Raises:
        CheckpointError: An `eos_token_id` is neither a token id nor a list of token ids.
    """
    found = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for value in given:
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int for token_id in values):
            raise CheckpointError(
                f"eos_token_id must be a token id or a list of them; the model's config says {quote(value)}"
            )
        found += values
    outside = [token_id for token_id in found if not 0 <= token_id < vocab_size]
    if outside:
        logger.warning("eos_token_id %s ends no output: the model's ids are 0 to %d", quote(outside), vocab_size - 1)
    return [token_id for token_id in dict.fromkeys(found) if 0 <= token_id < vocab_size]
