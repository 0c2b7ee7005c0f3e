"""What the file of a stage declares: settings, columns, place, and the function that makes the stage in a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, Protocol, TypeVar

from ...engine.config import EngineConfig
from .. import columns
from .base import Stage
from .stage_config import StageConfig

Config = TypeVar("Config", bound=StageConfig)


class Side(IntEnum):
    """The side of the engine on which a stage runs."""

    BEFORE_ENGINE = 0
    AFTER_ENGINE = 1


class ProcessorSettings(Protocol):
    """The settings of a processor that a maker may read; `EngineProcessorConfig` has them."""

    @property
    def tokenizer_source(self) -> str:
        """Folder of the model's tokenizer."""

    @property
    def engine_config(self) -> EngineConfig:
        """Settings of the engine."""

    @property
    def is_pooling(self) -> bool:
        """Whether the engine makes vectors and generates no text."""

    @property
    def declared_stages(self) -> Sequence[StageDeclaration[Any]]:
        """The stages that the processor may have, in the order in which they run."""

    def stage_config(self, stage: StageDeclaration[Config]) -> Config:
        """Returns the settings of a stage."""


@dataclass(frozen=True)
class StageDeclaration(Generic[Config]):
    """A stage as its file declares it. The constant `STAGE` of each file in `declared/` is one.

    Attributes:
        kind: Class of the stage.
        config: Settings of a stage that the user says nothing of. A stage is off by default if `enabled` is False.
        make: Makes the stage in its worker, from the settings of the processor and those of the stage.
        side: Side of the engine on which the stage runs.
        order: Place among the stages of that side; the lowest runs first.
        field: Field of the processor's config that holds the settings; None if the user cannot set any.
        required: Columns that a row must have to enter the stage.
        optional: Columns that the stage uses where a row has them.
    """

    kind: type[Stage]
    config: Config
    make: Callable[[ProcessorSettings, Config], Stage]
    side: Side
    order: int
    field: str | None = None
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the stage in a processor."""
        return self.kind.__name__

    @property
    def place(self) -> tuple[Side, int]:
        """What stages are sorted by."""
        return self.side, self.order

    @property
    def reads_generated(self) -> bool:
        """Whether the stage needs what only a generating engine makes."""
        return not {columns.GENERATED_TOKENS, columns.GENERATED_TEXT}.isdisjoint(self.required)

    def runs_with(self, settings: ProcessorSettings) -> bool:
        """Whether the stage runs in a processor of these settings."""
        is_possible = not (self.reads_generated and settings.is_pooling)
        return is_possible and settings.stage_config(self).enabled
