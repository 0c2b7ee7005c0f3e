"""`Worker`: a rank other than rank 0. It loads its part of the model and runs step plans until the engine closes.

A worker has no scheduler and no tokenizer. It computes each step at the same time as rank 0. The first rank of the last
pp stage, if it is a worker, sends the results back. It never waits for its device while a plan waits for it: the host
launches the next step while the device computes, and sends each result when it finds it ready.
"""

from __future__ import annotations

import contextlib
from collections import deque
from pathlib import Path
from typing import Protocol

from ..config import EngineConfig
from ..device import Device
from ..errors import EngineDeadError, MillraceError
from ..loading.load import load_runner, prepare_host, save_rank
from ..loading.model_source import resolve_model
from ..models import load_hf_config
from ..parallel.channel import Channel
from ..parallel.context import ParallelContext
from ..parallel.rendezvous import Rendezvous, join
from ..parallel.wire import Buffer
from ..step.head import RunningStep
from ..step.runner import ModelRunner
from ..tasks.choose import choose_task
from .plan_wire import decode_plan
from .result_wire import pack_result

__all__ = ["Watchdog", "Worker", "run_worker"]

SPIN_S = 0.002
"""Seconds for which a rank polls for the next plan before it sleeps; rank 0 plans faster while it has work."""

STEP, SAVE, CLOSE = b"p", b"s", b"c"
"""First byte of a message from rank 0: a step plan follows, or a folder to save to, or the engine closes."""


class Watchdog(Protocol):
    """A timer of steps, which reports a step that has not ended in time."""

    def before_step(self) -> None:
        """Starts the timer, or starts it again, because a step begins."""
        ...

    def stop(self) -> None:
        """Stops the timer, because no step is running or about to run."""
        ...


def run_worker(
    config: EngineConfig, rank: int, address: str, device_index: int | None = None, watchdog: Watchdog | None = None
) -> None:
    """Runs a rank of an engine until the engine closes.

    Args:
        config: Settings of the engine, the same for all ranks.
        rank: The rank, 1 or more. Rank 0 is the process of the engine itself.
        address: Address of the `Rendezvous` of rank 0.
        device_index: Index of the GPU, for a process that sees the GPUs of other ranks too; None for the current one.
        watchdog: Started before each step and stopped while the rank is idle; None for no watchdog.

    Raises:
        UserError: A setting or the model folder cannot be used.
        EngineDeadError: Another rank has ended, or a step failed on this rank.
    """
    place = ParallelContext.of_rank(rank, config.tensor_parallel_size, config.pipeline_parallel_size)
    device = Device.choose(config.device, device_index)
    team = join(Rendezvous.at(address), place, device.torch_device)
    (channel,) = team.channels
    runner = None
    try:
        runner = _load(config, device.shared_by(team.num_on_host), team.parallel)
        channel.send_object(None)
        Worker(config, runner, team.parallel, channel, watchdog).run()
    except EngineDeadError:
        raise
    except Exception as error:
        team.check()  # If rank 0 has ended, that is the cause of any error on this rank.
        _report(channel, rank, error)
        if isinstance(error, MillraceError):
            raise
        raise EngineDeadError(f"rank {rank} failed: {type(error).__name__}: {error}") from error
    finally:
        if runner is not None:
            runner.close()
        team.close()


def _load(config: EngineConfig, device: Device, parallel: ParallelContext) -> ModelRunner:
    prepare_host(config, device)
    hf_config = load_hf_config(resolve_model(config.model, config.hub), config.hf_overrides, **config.model_code)
    num_tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
    return load_runner(config, device, hf_config, choose_task(config, hf_config), num_tokens, parallel)[0]


class Worker:
    """A rank that has loaded its part of the model; `run` executes the messages of rank 0.

    Args:
        config: Settings of the engine.
        runner: Runner of this rank's part of the model.
        parallel: Context of this rank.
        channel: Channel to rank 0.
        watchdog: Started before each step and stopped while the rank is idle; None for no watchdog.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        parallel: ParallelContext,
        channel: Channel,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._config = config
        self._runner = runner
        self._parallel = parallel
        self._reports = parallel.reports and parallel.pp_size > 1
        self._channel = channel
        self._watchdog = watchdog
        self._unread: deque[RunningStep] = deque()
        """Steps whose results rank 0 does not have yet, in order; always empty if this rank does not report."""

    def run(self) -> None:
        """Receives messages from rank 0 and executes them (run a step, save the weights), until the engine closes."""
        while True:
            self._report_until_called()
            if not self._channel.spin(SPIN_S) and self._watchdog is not None:
                self._watchdog.stop()
            message = self._channel.receive()
            kind, content = message[:1], message[1:]
            if kind == STEP:
                self._step(content)
            elif kind == SAVE:
                self._report_all()  # Rank 0 takes the next message for the answer to this one.
                save_rank(self._config, self._parallel, Path(content.decode()))
                self._channel.send_object(None)
            else:
                return

    def _step(self, content: Buffer) -> None:
        if self._watchdog is not None:
            self._watchdog.before_step()
        step = self._runner.execute(decode_plan(content))
        if self._reports:
            self._unread.append(step)

    def _report_until_called(self) -> None:
        """Sends results that become ready, in order; returns when rank 0 has sent a message or all results are sent."""
        while self._unread:
            if self._unread[0].is_ready():
                self._report_first()
            elif self._channel.has_message(0):
                return

    def _report_all(self) -> None:
        """Waits for all started steps, and sends their results."""
        while self._unread:
            self._report_first()

    def _report_first(self) -> None:
        self._channel.send_object(pack_result(self._unread.popleft().result()))


def _report(channel: Channel, rank: int, error: Exception) -> None:
    """Sends the error of this rank to rank 0, if rank 0 is still connected."""
    told = error
    if not isinstance(error, MillraceError):  # Only errors of this package are sent.
        told = EngineDeadError(f"rank {rank} failed: {type(error).__name__}: {error}")
    with contextlib.suppress(EngineDeadError):
        channel.send_object(told)
