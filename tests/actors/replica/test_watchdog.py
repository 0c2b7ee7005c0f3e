"""The limits of the step watchdog, on a timer that only writes down what it is asked."""

from __future__ import annotations

import faulthandler
from typing import Any

import pytest

from millrace.actors.replica import watchdog
from millrace.actors.replica.watchdog import FIRST_STEPS_FACTOR, NUM_FIRST_STEPS, SLACK, StepWatchdog


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every timer that was started."""
    seconds: list[float] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda after_s, **_: seconds.append(after_s))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: None)
    return seconds


def test_the_first_steps_have_a_far_longer_limit_because_they_compile(started: list[float]) -> None:
    dog = StepWatchdog(600.0)
    for _ in range(NUM_FIRST_STEPS + 1):
        dog.before_step()
    assert started == pytest.approx([600 * FIRST_STEPS_FACTOR * (1 + SLACK)] * NUM_FIRST_STEPS + [600 * (1 + SLACK)])


def test_idle_time_does_not_bring_the_longer_limit_back(started: list[float]) -> None:
    dog = StepWatchdog(600.0)
    for _ in range(NUM_FIRST_STEPS):
        dog.before_step()
        dog.stop()
    dog.before_step()
    assert started[-1] == pytest.approx(600 * (1 + SLACK))


def test_short_steps_share_a_timer(started: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    clock: Any = type("Clock", (), {"monotonic": staticmethod(lambda: now_s[0])})
    monkeypatch.setattr(watchdog, "time", clock)
    dog = StepWatchdog(100.0)
    for _ in range(NUM_FIRST_STEPS):
        dog.before_step()
    started.clear()
    for now_s[0] in (0.0, 5.0, 9.0, 11.0, 12.0):
        dog.before_step()
    assert len(started) == 2
