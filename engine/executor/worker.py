"""One rank beside rank 0: loads its part of the model, then runs the plans it is sent until the engine is closed.

It has no scheduler and no tokenizer. It computes what rank 0 computes at the same time, and if it is the one that
reports (the first of the last of several stages), it sends the results back.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Protocol

from ..config import EngineConfig
from ..device import Device
from ..errors import EngineDeadError, MillraceError
from ..loading.model_source import resolve_model
from ..loading.runner import load_runner, prepare_host, save_rank
from ..models import load_hf_config
from ..parallel.channel import Channel
from ..parallel.context import ParallelContext
from ..parallel.rendezvous import Rendezvous, join
from ..step.runner import ModelRunner
from .plan_wire import decode_plan

__all__ = ["Watchdog", "Worker", "run_worker"]

SPIN_S = 0.002
"""How long a rank looks for the next plan before it sleeps: rank 0 makes one in less, when it has work."""

STEP, SAVE, CLOSE = b"p", b"s", b"c"
"""First byte of a message from rank 0: a step plan, a folder to save to, the end."""


class Watchdog(Protocol):
    """Sees to it that a step which never ends is told of."""

    def before_step(self) -> None:
        """Gives the step that begins its time."""
        ...

    def stop(self) -> None:
        """Lets any time pass: no step is running, nor about to."""
        ...


def run_worker(
    config: EngineConfig, rank: int, address: str, device_index: int | None = None, watchdog: Watchdog | None = None
) -> None:
    """Is a rank of an engine until that is closed.

    Args:
        config: Of the engine; the same for all ranks.
        rank: Which one, from 1 on. Rank 0 is the process of the engine itself.
        address: Of rank 0's `Rendezvous`.
        device_index: Of the GPU, where a process sees those of other ranks too; None for the current one.
        watchdog: Told of each step, and of the time without one; None for none.

    Raises:
        UserError: A setting or the model folder cannot be used.
        EngineDeadError: Another rank has ended, or this one's step failed.
    """
    place = ParallelContext.of_rank(rank, config.tensor_parallel_size, config.pipeline_parallel_size)
    device = Device.choose(config.device, device_index)
    team = join(Rendezvous.at(address), place, device.torch_device)
    (channel,) = team.channels
    try:
        runner = _load(config, device.shared_by(team.num_on_host), team.parallel)
        channel.send_object(None)
        Worker(config, runner, team.parallel, channel, watchdog).run()
    except EngineDeadError:
        raise
    except Exception as error:
        team.check()  # If rank 0 has ended, that is why, whatever came of it here.
        _report(channel, rank, error)
        if isinstance(error, MillraceError):
            raise
        raise EngineDeadError(f"rank {rank} failed: {type(error).__name__}: {error}") from error
    finally:
        team.close()


def _load(config: EngineConfig, device: Device, parallel: ParallelContext) -> ModelRunner:
    prepare_host(config, device)
    hf_config = load_hf_config(resolve_model(config.model), config.hf_overrides)
    num_tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
    return load_runner(config, device, hf_config, num_tokens, parallel)[0]


class Worker:
    """A rank that has loaded its part of the model.

    Args:
        config: Of the engine.
        runner: The rank's part.
        parallel: Which rank it is.
        channel: To rank 0.
        watchdog: Told of each step, and of the time without one; None for none.
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

    def run(self) -> None:
        """Does what rank 0 says until it says that it is over."""
        while True:
            if not self._channel.spin(SPIN_S) and self._watchdog is not None:
                self._watchdog.stop()
            message = self._channel.receive()
            kind, content = message[:1], message[1:]
            if kind == STEP:
                self._step(content)
            elif kind == SAVE:
                save_rank(self._config, self._parallel, Path(content.decode()))
                self._channel.send_object(None)
            else:
                return

    def _step(self, content: bytes) -> None:
        if self._watchdog is not None:
            self._watchdog.before_step()
        step = self._runner.execute(decode_plan(content))
        if self._reports:
            self._channel.send_object(step.result())


def _report(channel: Channel, rank: int, error: Exception) -> None:
    """Tells rank 0 what went wrong here, if it still listens."""
    told = error
    if not isinstance(error, MillraceError):  # It may not pickle.
        told = EngineDeadError(f"rank {rank} failed: {type(error).__name__}: {error}")
    with contextlib.suppress(EngineDeadError):
        channel.send_object(told)
