"""`Executor`: runs step plans, in this process or on many ranks. It separates planning from computing."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ..config import EngineConfig
from ..parallel.context import SINGLE
from ..step.head import StepResult
from ..step.runner import ModelRunner
from ..step_plan import StepPlan


class StepHandle(Protocol):
    """A step that was started, and may still be running."""

    def result(self) -> StepResult:
        """Waits for the step and returns its result; raises the error of a step that failed."""
        ...


class Executor(Protocol):
    """Runs the steps of an engine on its ranks, in the order in which `execute` gets their plans."""

    def execute(self, plan: StepPlan) -> StepHandle:
        """Starts a step and returns its handle; on a GPU the step may still be running when this method returns."""
        ...

    def save_sharded_state(self, config: EngineConfig, folder: Path) -> None:
        """Writes each rank's part of the checkpoint that `config` names to files of its own in `folder`."""
        ...

    def close(self) -> None:
        """Frees the model and the KV cache."""
        ...


class InProcessExecutor:
    """Runs the model in this process, on one device.

    Args:
        runner: Runner of the model.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner: ModelRunner | None = runner

    def execute(self, plan: StepPlan) -> StepHandle:
        """Starts a step and returns its handle; on a GPU the step may still be running when this method returns."""
        assert self._runner is not None, "the executor is closed"
        return self._runner.execute(plan)

    def save_sharded_state(self, config: EngineConfig, folder: Path) -> None:
        """Writes the weights of the checkpoint that `config` names to `folder`; this process is the only rank."""
        from ..loading.load import save_rank

        save_rank(config, SINGLE, folder)

    def close(self) -> None:
        """Frees the model and the KV cache."""
        self._runner = None
