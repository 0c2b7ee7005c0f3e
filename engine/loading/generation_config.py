"""The sampling defaults that a model's makers recommend, in its generation_config.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SamplingParamsError
from ..sampling_params import SamplingParams

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
        Its content; empty if there is none.

    Raises:
        CheckpointError: The file is not JSON.
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


def default_sampling_params(config: Mapping[str, Any]) -> SamplingParams:
    """Makes the parameters of requests that bring none.

    Args:
        config: Content of generation_config.json.

    Returns:
        `SamplingParams` with the recommended values over the ordinary defaults; greedy if the model asks for no
        sampling. Values that cannot be used are left out, with a warning: a request may bring its own.
    """
    values = {name: config[name] for name in SAME_NAME if config.get(name) is not None}
    if config.get("max_new_tokens") is not None:
        values["max_tokens"] = config["max_new_tokens"]
    if config.get("do_sample") is False and "temperature" not in values:
        values["temperature"] = 0.0
    try:
        return SamplingParams.from_dict(values)
    except SamplingParamsError as error:
        logger.warning("the defaults of generation_config.json are ignored: %s", error)
        return SamplingParams()
