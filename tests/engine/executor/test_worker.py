"""What a rank beside rank 0 does with what it is sent."""

from __future__ import annotations

import threading
import time

from millrace.engine.config import EngineConfig
from millrace.engine.executor.plan_wire import encode_plan
from millrace.engine.executor.worker import CLOSE, STEP, Worker
from millrace.engine.parallel.context import SINGLE
from millrace.engine.step_plan import StepPlan
from ranks import connected_channels


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
    rank_0.send(STEP + encode_plan(StepPlan(rows=[7], starts=[0], counts=[1], samples=[True])))
    while log[-2:] != ["step of [7]", "stop"]:
        time.sleep(0.001)
    rank_0.send(CLOSE)
    thread.join()
    assert [line for line in log if line != "stop"] == ["before a step", "step of [7]"]
