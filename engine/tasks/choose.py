"""Chooses the task of an engine: `choose_task`, from what the user asks for and what the checkpoint is made for."""

from __future__ import annotations

from typing import Any

from ..config import EngineConfig
from ..errors import ConfigError
from ..models import find_family
from .classify import Classify
from .embed import Embed
from .generate import Generate
from .task import Task

__all__ = ["TASKS", "choose_task"]

TASKS: tuple[type[Task], ...] = (Generate, Embed, Classify)
"""Every task; the first of a runner is the one that the runner stands for where the model is made for another."""


def choose_task(config: EngineConfig, hf_config: Any) -> Task:
    """Returns the task of an engine.

    Args:
        config: `task` and `runner` say what the user wants.
        hf_config: The model's config; its architecture says what the checkpoint is made for.

    Raises:
        ConfigError: The model cannot do what is asked, or a setting of the task does not fit the model.
        CheckpointError: The model's folder asks for something that this release cannot do.
        UnsupportedModelError: The architecture is not implemented.
    """
    find_family(hf_config)
    architecture = hf_config.architectures[0]
    natural = next(task for task in TASKS if architecture.endswith(task.architecture_ending))
    asked = _asked(config, natural)
    if asked is not natural and not asked.takes_any_model:
        raise ConfigError(
            f"task={asked.name!r} needs a checkpoint of an architecture *{asked.architecture_ending}, and "
            f"{config.model} is a {architecture}; use runner={natural.runner!r}"
        )
    return asked.create(config, hf_config)


def _asked(config: EngineConfig, natural: type[Task]) -> type[Task]:
    """Returns the task that the settings ask for; the natural one if they leave it open."""
    if config.task != "auto":
        return next(task for task in TASKS if task.name == config.task)
    if config.runner in ("auto", natural.runner):
        return natural
    return next(task for task in TASKS if task.runner == config.runner)
