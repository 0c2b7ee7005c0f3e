"""What a rank beside rank 0 does with what it is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from millrace.engine.config import EngineConfig
from millrace.engine.executor.plan_wire import encode_plan
from millrace.engine.executor.result_wire import unpack_result
from millrace.engine.executor.worker import CLOSE, STEP, Worker
from millrace.engine.parallel.channel import Channel
from millrace.engine.parallel.context import SINGLE, ParallelContext
from millrace.engine.step.head import StepResult
from millrace.engine.step_plan import StepPlan
from ranks import connected_channels


def plan_of(row: int) -> bytes:
    """Returns the message of a step of one sequence."""
    return STEP + encode_plan(StepPlan(rows=[row], starts=[0], counts=[1], samples=[True]))


class Log(list[str]):
    """A runner and a watchdog that write down what happens to them."""

    def execute(self, plan: StepPlan) -> None:
        self.append(f"step of {plan.rows}")

    def before_step(self) -> None:
        self.append("before a step")

    def stop(self) -> None:
        self.append("stop")


def test_the_watchdog_is_told_of_steps_and_of_the_time_without_one() -> None:
    rank_0, channel = connected_channels()
    log = Log()
    worker = Worker(EngineConfig(model="nowhere"), log, SINGLE, channel, log)  # type: ignore[arg-type]
    thread = threading.Thread(target=worker.run)
    thread.start()
    rank_0.send(plan_of(7))
    while log[-2:] != ["step of [7]", "stop"]:
        time.sleep(0.001)
    rank_0.send(CLOSE)
    thread.join()
    assert [line for line in log if line != "stop"] == ["before a step", "step of [7]"]


@dataclass
class SlowDevice:
    """A runner whose steps end one by one, when the test says so; a step draws the number of its row."""

    started: list[int] = field(default_factory=list)
    num_done: int = 0
    error: Exception | None = None

    def execute(self, plan: StepPlan) -> SlowStep:
        self.started += plan.rows
        return SlowStep(self, len(self.started), plan.rows)

    def wait_for(self, is_reached: Callable[[], bool]) -> None:
        while not is_reached():
            time.sleep(0.001)


@dataclass
class SlowStep:
    """A step that was started on a `SlowDevice`."""

    device: SlowDevice
    number: int
    drawn: list[int]

    def is_ready(self) -> bool:
        if self.device.error is not None:
            raise self.device.error
        return self.device.num_done >= self.number

    def result(self) -> StepResult:
        assert self.is_ready(), "the rank waits for its device"
        return StepResult(self.drawn)


@dataclass
class LastStage:
    """A rank of the last pp stage in a thread, with the connection of rank 0 to it."""

    device: SlowDevice
    rank_0: Channel
    thread: threading.Thread
    errors: list[Exception]

    def draw(self) -> list[int]:
        return unpack_result(self.rank_0.receive_object()).drawn


@pytest.fixture
def last_stage() -> LastStage:
    rank_0, channel = connected_channels()
    device, errors = SlowDevice(), []
    place = ParallelContext.of_rank(1, tp_size=1, pp_size=2)
    worker = Worker(EngineConfig(model="nowhere"), device, place, channel)  # type: ignore[arg-type]

    def run() -> None:
        try:
            worker.run()
        except Exception as error:  # noqa: BLE001  # The tests look at it.
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return LastStage(device, rank_0, thread, errors)


def test_the_next_step_starts_before_the_result_of_the_last_is_there(last_stage: LastStage) -> None:
    device = last_stage.device
    for row in (4, 5):
        last_stage.rank_0.send(plan_of(row))
    device.wait_for(lambda: device.started == [4, 5])
    assert not last_stage.rank_0.has_message(0), "no step has ended"
    device.num_done = 2
    assert [last_stage.draw(), last_stage.draw()] == [[4], [5]]
    last_stage.rank_0.send(plan_of(6))
    device.num_done = 3
    assert last_stage.draw() == [6]
    last_stage.rank_0.send(CLOSE)
    last_stage.thread.join()


def test_the_end_of_the_engine_does_not_wait_for_the_device(last_stage: LastStage) -> None:
    last_stage.rank_0.send(plan_of(4))
    last_stage.rank_0.send(CLOSE)
    last_stage.thread.join()
    assert not last_stage.errors


def test_a_device_that_fails_after_a_step_was_started_ends_the_rank(last_stage: LastStage) -> None:
    last_stage.rank_0.send(plan_of(4))
    last_stage.device.error = RuntimeError("an illegal memory access")
    last_stage.thread.join()
    assert str(last_stage.errors[0]) == "an illegal memory access"
