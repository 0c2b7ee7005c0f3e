"""What an engine is for: `choose_task`, from what the user asks for and what the checkpoint is."""

from __future__ import annotations

from typing import Any, Literal

from .config import EngineConfig
from .errors import ConfigError
from .models import find_family

__all__ = ["Task", "choose_task"]

Task = Literal["generate", "embed", "classify"]

NATURAL: dict[str, Task] = {"ForCausalLM": "generate", "ForSequenceClassification": "classify", "Model": "embed"}
"""How an architecture's name ends -> what its checkpoints are for."""


def choose_task(config: EngineConfig, hf_config: Any) -> Task:
    """Returns what an engine does.

    Args:
        config: `task` and `runner` say what the user wants.
        hf_config: The model's config, which says what it can do.

    Returns:
        The task. A model that generates embeds if asked to, and so does a classifier, whose hidden states those are.

    Raises:
        ConfigError: The model cannot do what is asked.
        UnsupportedModelError: The architecture is not implemented.
    """
    find_family(hf_config)
    architecture = hf_config.architectures[0]
    natural = next(task for ending, task in NATURAL.items() if architecture.endswith(ending))
    asked = config.task
    if asked == "auto" and config.runner == "pooling" and natural == "generate":
        asked = "embed"
    if asked == "auto" and config.runner == "generate":
        asked = "generate"
    if asked in ("auto", natural):
        return natural
    if asked == "embed":
        return "embed"
    needs = next(ending for ending, task in NATURAL.items() if task == asked)
    raise ConfigError(
        f"task={asked!r} needs a checkpoint of an architecture *{needs}, and {config.model} is a {architecture}; use "
        f"runner={'generate' if natural == 'generate' else 'pooling'!r}"
    )
