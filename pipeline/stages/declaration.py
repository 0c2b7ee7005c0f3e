"""`StageDeclaration`: the settings, columns, place and maker of a stage, which the file of the stage declares."""

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
    """The settings of a processor that the maker of a stage may read. `EngineProcessorConfig` implements them."""

    @property
    def tokenizer_source(self) -> str:
        """Folder of the model's tokenizer."""

    @property
    def engine_config(self) -> EngineConfig:
        """Settings of the engine."""

    @property
    def is_pooling(self) -> bool:
        """Whether the engine computes vectors and generates no text."""

    @property
    def reads_pairs(self) -> bool:
        """Whether a row has pairs of texts in place of a prompt, so that no stage makes a prompt."""

    @property
    def declared_stages(self) -> Sequence[StageDeclaration[Any]]:
        """The stages that the processor may have, in the order in which they run."""

    def stage_config(self, stage: StageDeclaration[Config]) -> Config:
        """Returns the settings of a stage."""


@dataclass(frozen=True)
class StageDeclaration(Generic[Config]):
    """The declaration of a stage. Each file in `declared/` holds one in the constant `STAGE`.

    Attributes:
        kind: Class of the stage.
        config: Default settings of the stage. The stage is off by default if `enabled` is False.
        make: Function that makes the stage in a worker, from the settings of the processor and of the stage.
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
        """The key by which stages are sorted: side, then order."""
        return self.side, self.order

    @property
    def reads_generated(self) -> bool:
        """Whether the stage reads a column that only a generating engine writes."""
        return not {columns.GENERATED_TOKENS, columns.GENERATED_TEXT}.isdisjoint(self.required)

    def runs_with(self, settings: ProcessorSettings) -> bool:
        """Returns whether the stage runs in a processor with these settings."""
        makes_prompt = self.side == Side.BEFORE_ENGINE
        is_possible = not (self.reads_generated and settings.is_pooling) and not (makes_prompt and settings.reads_pairs)
        return is_possible and settings.stage_config(self).enabled
