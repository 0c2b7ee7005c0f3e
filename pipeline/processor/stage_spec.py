"""A stage of a processor before a worker makes it: its name, its settings, its columns, and the function that makes it.

A processor is a list of these with at most one `Backend` among them. Stages of your own join the list as `CustomStage`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engine.errors import ConfigError, unknown_key_message
from ..stages.base import Stage
from ..stages.declaration import ProcessorSettings, StageDeclaration
from ..stages.stage_config import StageConfig

MakeStage = Callable[[], Stage]
"""Makes a stage in the process that runs it; it pickles."""


@dataclass(frozen=True)
class StageInfo:
    """What a processor tells of one of its stages.

    Attributes:
        name: Name of the stage.
        config: Settings of the stage. Of an engine or a deployment, they are the settings of the processor.
        required: Columns that a row must have to enter the stage.
        optional: Columns that the stage uses where a row has them.
    """

    name: str
    config: Any
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageSpec:
    """A stage that runs on a CPU, in one process with its neighbours.

    Attributes:
        info: Name, settings and columns.
        make: Makes the stage in the worker.
    """

    info: StageInfo
    make: MakeStage

    @classmethod
    def of(cls, stage: StageDeclaration[Any], settings: ProcessorSettings) -> StageSpec:
        """Returns a declared stage with its settings in a processor.

        Args:
            stage: What the file of the stage declares.
            settings: Settings of the processor.
        """
        config = settings.stage_config(stage)
        info = StageInfo(stage.name, config, stage.required, stage.optional)
        return cls(info, functools.partial(stage.make, settings, config))


@dataclass(frozen=True)
class CustomStage:
    """A stage of your own, and its place among the others.

    Attributes:
        kind: Class derived from `Stage`. The worker that runs the stage makes it.
        arguments: Keyword arguments of its constructor; they must pickle.
        before: Name, as in `list_stage_names`, of the stage that this one goes before.
        after: Name of the stage that this one goes after. With neither, it comes last, before `postprocess`.
        config: Resources and batch size of the stage.
        required: Columns that a row must have to enter the stage.
        optional: Columns that the stage uses where a row has them.
    """

    kind: type[Stage]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    before: str | None = None
    after: str | None = None
    config: StageConfig = field(default_factory=StageConfig)
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.kind, type) and issubclass(self.kind, Stage)):
            raise ConfigError(f"a custom stage must be a class derived from Stage; got {self.kind!r:.80}")
        if self.before is not None and self.after is not None:
            raise ConfigError(f"stage {self.kind.__name__} is given a place before and after; name one stage only")

    def spec(self, taken: Sequence[str]) -> StageSpec:
        """Returns the stage as one of a processor.

        Args:
            taken: Names of the stages that the processor has; a second stage of a class gets a number.
        """
        name = own = self.kind.__name__
        number = 0
        while name in taken:
            number += 1
            name = f"{own}_{number}"
        info = StageInfo(name, self.config, self.required, self.optional)
        return StageSpec(info, functools.partial(self.kind, **self.arguments))

    def index(self, names: Sequence[str]) -> int:
        """Returns the place of the stage in a list of stages.

        Args:
            names: The names of the stages in the list, in order.

        Raises:
            ConfigError: The list has no stage of the name in `before` or `after`.
        """
        neighbour = self.before or self.after
        if neighbour is None:
            return len(names)
        return index_of(neighbour, names) + (self.after is not None)


def index_of(name: str, names: Sequence[str]) -> int:
    """Returns the place of a stage.

    Args:
        name: Name of the stage.
        names: Names of all stages, in order.

    Raises:
        ConfigError: No stage has the name.
    """
    if name not in names:
        raise ConfigError(unknown_key_message("the processor", name, names).replace("field", "stage"))
    return list(names).index(name)
