"""`choose_task`: chooses the task of an engine from its settings and from the architecture of the checkpoint."""

from __future__ import annotations

from typing import Any

from ..config import EngineConfig
from ..errors import ConfigError
from ..models import describe_model, find_family
from .classify import Classify
from .embed import Embed
from .generate import Generate
from .task import Task

__all__ = ["TASKS", "choose_task"]

TASKS: tuple[type[Task], ...] = (Generate, Embed, Classify)
"""All tasks. The first task of a runner is chosen if the settings name that runner and the checkpoint fits another."""


def choose_task(config: EngineConfig, hf_config: Any) -> Task:
    """Returns the task of an engine.

    Args:
        config: Settings of the engine; `task` and `runner` say which task the user asks for.
        hf_config: Config of the model; its architecture says which task the checkpoint is made for.

    Raises:
        ConfigError: The model cannot do the task, or a setting of the task does not fit the model.
        CheckpointError: The model's folder asks for a kind of pooling that this release does not have.
        UnsupportedModelError: The architecture is not implemented.
    """
    find_family(hf_config)
    architecture = hf_config.architectures[0]
    natural = _natural(architecture)
    asked = _asked(config, natural)
    if asked.decodes and describe_model(hf_config).is_encoder:
        raise ConfigError(
            f"{config.model} is an encoder, whose tokens attend to later tokens, so it generates no text; use "
            "task='embed', or for a decoder hf_overrides={'is_causal': True}"
        )
    if asked is not natural and not asked.takes_any_model:
        raise ConfigError(
            f"task={asked.name!r} needs a checkpoint of an architecture *{asked.architecture_endings[0]}, and "
            f"{config.model} is a {architecture}; use runner={natural.runner!r}"
        )
    return asked.create(config, hf_config)


def _asked(config: EngineConfig, natural: type[Task]) -> type[Task]:
    """Returns the task class that `config` asks for; `natural`, the checkpoint's own, if it leaves that open."""
    if config.task == "score":
        return natural if natural is Classify else Embed
    if config.task == "reward":
        return Classify
    if config.task != "auto":
        return next(task for task in TASKS if config.task in task.all_names())
    if config.runner in ("auto", natural.runner):
        return natural
    return next(task for task in TASKS if task.runner == config.runner)


def _natural(architecture: str) -> type[Task]:
    """Returns the task that an architecture is made for: the one with the longest ending of its name."""
    endings = {ending: task for task in TASKS for ending in task.architecture_endings}
    return endings[max((ending for ending in endings if architecture.endswith(ending)), key=len)]
