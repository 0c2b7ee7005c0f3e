"""`StageSpec`: a stage of a processor before a worker makes it, with its name, settings, columns and maker.

A processor is a list of stage specs with at most one `Backend` among them. A user adds a stage as a `CustomStage`.
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
"""A function that makes a stage in the process that runs it. The function must pickle."""


@dataclass(frozen=True)
class StageInfo:
    """The description of a stage that a processor returns to users.

    Attributes:
        name: Name of the stage.
        config: Settings of the stage; for the stage of an engine or a deployment, the settings of the processor.
        required: Columns that a row must have to enter the stage.
        optional: Columns that the stage uses where a row has them.
    """

    name: str
    config: Any
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageSpec:
    """The spec of a stage that runs on a CPU, in one process with the stages next to it; a worker makes the stage.

    Attributes:
        info: Name, settings and columns.
        make: Function that makes the stage in the worker.
    """

    info: StageInfo
    make: MakeStage

    @classmethod
    def of(cls, stage: StageDeclaration[Any], settings: ProcessorSettings) -> StageSpec:
        """Returns the spec of a declared stage with the settings that it has in a processor.

        Args:
            stage: Declaration of the stage.
            settings: Settings of the processor.
        """
        config = settings.stage_config(stage)
        info = StageInfo(stage.name, config, stage.required, stage.optional)
        return cls(info, functools.partial(stage.make, settings, config))


@dataclass(frozen=True)
class CustomStage:
    """A stage of the user, and its place among the stages of a processor.

    Attributes:
        kind: Class derived from `Stage`. The worker that runs the stage makes it.
        arguments: Keyword arguments of its constructor; they must pickle.
        before: Name, as in `list_stage_names`, of the stage that this one goes before.
        after: Name of the stage that this one goes after. Without `before` and `after`, it is the last stage.
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
        """Returns the spec of the stage. The second stage of a class gets a number in its name.

        Args:
            taken: Names of the stages that the processor has already.
        """
        name = own = self.kind.__name__
        number = 0
        while name in taken:
            number += 1
            name = f"{own}_{number}"
        info = StageInfo(name, self.config, self.required, self.optional)
        return StageSpec(info, functools.partial(self.kind, **self.arguments))

    def index(self, names: Sequence[str]) -> int:
        """Returns the index at which the stage is inserted into a list of stages.

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
    """Returns the index of the stage with a name in a list of stages.

    Args:
        name: Name of the stage.
        names: Names of all stages, in order.

    Raises:
        ConfigError: No stage has the name.
    """
    if name not in names:
        raise ConfigError(unknown_key_message("the processor", name, names).replace("field", "stage"))
    return list(names).index(name)
