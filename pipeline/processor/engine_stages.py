"""`engine_stages`: the stages of a processor that runs an engine, in order."""

from __future__ import annotations

from ..stages.declaration import Side
from .backend import Backend
from .config import EngineProcessorConfig
from .engine_backend import EngineBackend
from .stage_spec import StageSpec


def engine_stages(config: EngineProcessorConfig, backend: Backend | None = None) -> list[StageSpec | Backend]:
    """Returns the stages of a processor: the declared stages that are on, with the backend between them.

    Args:
        config: Settings of the processor.
        backend: The backend; None for a pool of engines with these settings.
    """
    before, after = stages_on(Side.BEFORE_ENGINE, config), stages_on(Side.AFTER_ENGINE, config)
    return [*before, backend or EngineBackend(config), *after]


def stages_on(side: Side, config: EngineProcessorConfig) -> list[StageSpec]:
    """Returns the declared stages that are on and run on one side of the engine, in order.

    Args:
        side: Side of the engine.
        config: Settings of the processor.
    """
    on = (stage for stage in config.declared_stages if stage.side == side and stage.runs_with(config))
    return [StageSpec.of(stage, config) for stage in on]
