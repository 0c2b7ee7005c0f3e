"""The stages of a processor that runs an engine, in order."""

from __future__ import annotations

from ..stages.declaration import Side
from .backend import Backend
from .config import EngineProcessorConfig
from .engine_backend import EngineBackend
from .stage_spec import StageSpec


def engine_stages(config: EngineProcessorConfig, backend: Backend | None = None) -> list[StageSpec | Backend]:
    """Returns the stages of an engine's processor: the declared ones that are on, and the engine between them.

    Args:
        config: Settings of the processor.
        backend: The engine; None for a pool of replicas with these settings.
    """
    before, after = stages_on(Side.BEFORE_ENGINE, config), stages_on(Side.AFTER_ENGINE, config)
    return [*before, backend or EngineBackend(config), *after]


def stages_on(side: Side, config: EngineProcessorConfig) -> list[StageSpec]:
    """Returns the stages that run on one side of the engine.

    Args:
        side: The side.
        config: Settings of the processor.
    """
    on = (stage for stage in config.declared_stages if stage.side == side and stage.runs_with(config))
    return [StageSpec.of(stage, config) for stage in on]
