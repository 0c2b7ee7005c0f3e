"""A stage of a processor before it runs: its name, its settings, and how a worker makes it.

A processor is a list of these with at most one `Backend` among them. Stages of your own join the list as `CustomStage`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engine.errors import ConfigError, unknown_key_message
from ..stages.base import Stage
from .config import StageConfig

MakeStage = Callable[[], Stage]
"""Makes a stage in the process that runs it; it pickles."""


@dataclass(frozen=True)
class StageInfo:
    """What can be asked of a stage of a processor.

    Attributes:
        name: Its name.
        config: Its settings; those of the whole processor for the stage in the middle.
        required: Columns a row must have to enter it.
        optional: Columns it makes use of.
    """

    name: str
    config: Any
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class StagePlan:
    """A stage that runs on a CPU, in one process with its neighbours.

    Attributes:
        info: Its name, settings and columns.
        make: Makes it, in the worker.
    """

    info: StageInfo
    make: MakeStage


@dataclass(frozen=True)
class CustomStage:
    """A stage of your own, and its place among the others.

    Attributes:
        kind: Class derived from `Stage`. It is made in the worker that runs it.
        arguments: Keyword arguments of its constructor; they must pickle.
        before: Name of the stage that it stands before, as `list_stage_names` has it.
        after: Name of the stage that it stands after. With neither it comes last, before `postprocess`.
        config: Its resources.
        required: Columns a row must have to enter it.
        optional: Columns it makes use of.
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

    def plan(self, taken: Sequence[str], *, stop_on_error: bool) -> StagePlan:
        """Returns the stage as one of a processor.

        Args:
            taken: Names of the stages that are there; a second stage of a class gets a number.
            stop_on_error: Whether the first failed row stops the job.
        """
        name = own = self.kind.__name__
        number = 0
        while name in taken:
            number += 1
            name = f"{own}_{number}"
        info = StageInfo(name, self.config, self.required, self.optional)
        return StagePlan(info, functools.partial(_make_custom, self.kind, dict(self.arguments), stop_on_error))

    def index(self, names: Sequence[str]) -> int:
        """Returns where in a list of stages it goes.

        Args:
            names: Their names, in order.

        Raises:
            ConfigError: None of them is the one it is to stand by.
        """
        neighbour = self.before or self.after
        if neighbour is None:
            return len(names)
        return index_of(neighbour, names) + (self.after is not None)


def index_of(name: str, names: Sequence[str]) -> int:
    """Returns the place of a stage.

    Args:
        name: Its name.
        names: Names of all stages, in order.

    Raises:
        ConfigError: None has the name.
    """
    if name not in names:
        raise ConfigError(unknown_key_message("the processor", name, names).replace("field", "stage"))
    return list(names).index(name)


def _make_custom(kind: type[Stage], arguments: Mapping[str, Any], stop_on_error: bool) -> Stage:
    stage = kind(**arguments)
    # Not an argument: a stage whose constructor does not pass it on works too.
    stage.stop_on_error = stop_on_error
    return stage
