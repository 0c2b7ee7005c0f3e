"""`DistributedExecutor`: runs step plans on many ranks. This process is rank 0; each other rank runs a `Worker`.

Rank 0 sends a step plan to all ranks as a few hundred bytes. After that the ranks exchange only the sums of the model.
One rank reports the results, and sends them if it is not rank 0. A step that fails on any rank ends the engine, because
the other ranks are by then waiting in a sum that will never be complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..config import EngineConfig
from ..device import Device
from ..errors import EngineDeadError, UserError
from ..loading.capacity import Capacity
from ..loading.load import load_runner, prepare_host, save_rank
from ..models import describe_model
from ..models.pp_stages import check_parallel
from ..parallel.channel import Channel
from ..parallel.context import ParallelContext
from ..parallel.rendezvous import Rendezvous, Team, join
from ..step.head import RunningStep, StepResult
from ..step.runner import ModelRunner
from ..step_plan import StepPlan
from ..tasks.task import Task
from .executor import StepHandle
from .launch import LocalRanks
from .plan_wire import encode_plan, known_tokens
from .result_wire import unpack_result
from .worker import CLOSE, SAVE, STEP

__all__ = ["DistributedExecutor", "RankProcesses", "start_ranks"]

T = TypeVar("T")


class RankProcesses(Protocol):
    """The processes of the other ranks of an engine, which rank 0 has started and ends."""

    def check(self) -> None:
        """Raises `EngineDeadError` if a process has ended."""
        ...

    def close(self) -> None:
        """Ends the processes and waits until they have ended."""
        ...


@dataclass(eq=False, slots=True)
class TeamStep:
    """A step that was started on all ranks.

    Attributes:
        executor: The executor that started it.
        local: The step on this rank, which gives the result; None if a rank of another pp stage sends the result.
        received: The result that a rank of another pp stage has sent; None until rank 0 has received it.
    """

    executor: DistributedExecutor
    local: RunningStep | None
    received: StepResult | None = None

    def result(self) -> StepResult:
        """Waits for the step and returns its result.

        Raises:
            EngineDeadError: A rank has ended.
        """
        local = self.local
        if local is not None:
            return self.executor.guard(lambda: self.executor.wait_for(local))
        return self.executor.guard(lambda: self.executor.receive_until(self))


class DistributedExecutor:
    """Executor of rank 0: sends each step plan to the other ranks, and runs the part of the step of its own rank.

    Args:
        runner: Runner of this rank's part of the model.
        team: The connected ranks.
        processes: Processes of the other ranks; None if this engine has not started them.

    Attributes:
        processes: Processes of the other ranks, or None.
    """

    def __init__(self, runner: ModelRunner, team: Team, processes: RankProcesses | None = None) -> None:
        self._runner: ModelRunner | None = runner
        self._team = team
        self.processes = processes
        self._has_stages = team.parallel.pp_size > 1
        # The first rank of the last pp stage also reports the results. It is rank 0 if there is one stage.
        self._first_drawing = (team.parallel.pp_size - 1) * team.parallel.tp_size
        self._reporting = team.channels[self._first_drawing - 1] if self._first_drawing else None
        self._unread: deque[TeamStep] = deque()
        self._error: EngineDeadError | None = None

    def execute(self, plan: StepPlan) -> StepHandle:
        """Starts a step on all ranks. On a CPU this rank has computed its part when the call returns."""
        return self.guard(lambda: self._execute(plan))

    def save_sharded_state(self, config: EngineConfig, folder: Path) -> None:
        """Makes each rank read its part of the checkpoint that `config` names, and write it to files of its own."""
        self.guard(lambda: self._save(config, folder))

    def close(self) -> None:
        """Ends the other ranks and frees this rank's part of the model."""
        if self._runner is None:
            return
        self._runner.close()
        self._runner = None
        for channel in self._team.channels:
            try:
                channel.send(CLOSE)
            except EngineDeadError:  # The other end is closed already, which is the aim.
                continue
        self._team.close()
        if self.processes is not None:
            self.processes.close()

    def guard(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`, a task of all ranks. An exception in it ends the engine on all ranks.

        Raises:
            EngineDeadError: `work` failed, or the work of an earlier call did.
        """
        if self._error is not None:
            raise self._error
        try:
            return work()
        except Exception as error:
            self._error = explain(self._team, error)
            self.close()
            raise self._error from error
        except BaseException:  # An interrupt: this rank leaves a step that the other ranks still wait in.
            self._error = EngineDeadError("the engine was interrupted in the middle of a step; construct another one")
            self.close()
            raise

    def wait_for(self, step: RunningStep) -> StepResult:
        """Waits for this rank's step and returns its result.

        All ranks are checked meanwhile, since a sum on a GPU would wait for a dead rank for ever.
        """
        while not step.is_ready():
            self._team.check()
        return step.result()

    def receive_until(self, step: TeamStep) -> StepResult:
        """Receives the results of steps in order until `step` has its result, and returns the result of `step`."""
        while step.received is None:
            assert self._reporting is not None
            message = self._team.receive_from(self._reporting)
            if isinstance(message, Exception):
                raise message
            self._unread.popleft().received = unpack_result(message)
        return step.received

    def _execute(self, plan: StepPlan) -> TeamStep:
        assert self._runner is not None, "the executor is closed"
        if self._has_stages:
            plan.new_tokens = known_tokens(plan)
        message = unmasked = STEP + encode_plan(plan)
        if self._has_stages and plan.token_masks is not None:
            # The masks of a step are megabytes, and only the last pp stage draws.
            unmasked = STEP + encode_plan(plan, with_masks=False)
        for rank, channel in enumerate(self._team.channels, start=1):
            channel.send(message if rank >= self._first_drawing else unmasked)
        local = self._runner.execute(plan)
        if not self._has_stages:
            return TeamStep(self, local)
        step = TeamStep(self, None)
        self._unread.append(step)
        return step

    def _save(self, config: EngineConfig, folder: Path) -> None:
        for channel in self._team.channels:
            channel.send(SAVE + str(folder).encode())
        save_rank(config, self._team.parallel, folder)
        for channel in self._team.channels:
            if (error := channel.receive_object()) is not None:
                raise error


def start_ranks(
    config: EngineConfig, device: Device, hf_config: Any, task: Task, rendezvous: Rendezvous | None
) -> tuple[DistributedExecutor, Capacity]:
    """Connects the ranks of an engine and loads the model, in rank 0.

    Args:
        config: Settings of the engine.
        device: Device of rank 0.
        hf_config: Config of the model.
        task: Task of the engine.
        rendezvous: Rendezvous that the other ranks join; None to start them as processes of this host.

    Returns:
        The executor, and the most tokens of a sequence and KV cache blocks that all ranks have room for.

    Raises:
        UserError: A setting or the model folder cannot be used.
        EngineDeadError: A rank did not connect in time, or has ended.
    """
    sizes = config.tensor_parallel_size, config.pipeline_parallel_size
    check_parallel(describe_model(hf_config), *sizes, expert_parallel=config.enable_expert_parallel)
    place = ParallelContext.of_rank(0, config.tensor_parallel_size, config.pipeline_parallel_size)
    processes = None
    if rendezvous is None:
        device.check_enough(config.num_ranks)
        rendezvous = Rendezvous.open()
        processes = LocalRanks(config, rendezvous.address)
    team = runner = None
    try:
        check = processes.check if processes else _all_is_well
        team = join(rendezvous, place, device.torch_device, check)
        device = device.shared_by(team.num_on_host)
        prepare_host(config, device)
        num_tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
        runner, capacity = load_runner(config, device, hf_config, task, num_tokens, team.parallel)
        for channel in team.channels:
            if (error := channel.receive_object()) is not None:
                raise error
        return DistributedExecutor(runner, team, processes), capacity
    except BaseException as error:
        told = first_told(team) if team and isinstance(error, Exception) else None
        if runner is not None:
            runner.close()
        if team is not None:
            team.close()
        if processes is not None:
            processes.close()
        if told is not None and not isinstance(error, UserError):
            raise told from error
        raise


def _all_is_well() -> None:
    """Does nothing. `join` calls it in place of a check of processes, if this engine has not started the ranks."""


def explain(team: Team, error: Exception) -> EngineDeadError:
    """Returns the reason why a step failed: the error that another rank has sent, or else the error of this rank."""
    told = first_told(team)
    if told is not None:
        return told if isinstance(told, EngineDeadError) else EngineDeadError(str(told))
    if isinstance(error, EngineDeadError):
        return error
    return EngineDeadError(f"rank 0 failed: {type(error).__name__}: {error}")


def first_told(team: Team) -> Exception | None:
    """Returns the error of the first rank that has ended; None if none has."""
    return next((told for channel in team.channels if (told := _last_words(channel)) is not None), None)


def _last_words(channel: Channel) -> Exception | None:
    """Returns the error that a rank sent before it closed its channel, or else the error of the channel."""
    if not channel.is_closed():
        return None
    try:
        while True:
            message = channel.receive_object()
            if isinstance(message, Exception):
                return message
    except EngineDeadError as error:
        return error
