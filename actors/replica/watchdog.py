"""An end to steps that never end: `StepWatchdog`."""

from __future__ import annotations

import faulthandler
import sys
import time

SLACK = 0.1
"""Share of the limit that a step may take beyond it: the timer is not wound up for each step of a millisecond."""


class StepWatchdog:
    """Writes the stacks of this process's threads to its log when a step takes too long, and ends the process.

    The timer is Python's own, a thread in C: it fires as well while a stuck kernel holds the interpreter's lock. There
    is one such timer in a process, so one watchdog.

    Args:
        timeout_s: Seconds a step may take.
        is_fatal: Whether the process ends. One that goes on writes its stacks a little earlier: a rank beside the one
            that ends, with which it ends too.
    """

    def __init__(self, timeout_s: float, *, is_fatal: bool = True) -> None:
        self._timeout_s = timeout_s
        self._is_fatal = is_fatal
        assert sys.__stderr__ is not None  # Ray gives every worker one: its log.
        self._log = sys.__stderr__
        self._wound_up_at_s: float | None = None

    def before_step(self) -> None:
        """Gives the step that begins its time."""
        now_s = time.monotonic()
        if self._wound_up_at_s is None or now_s - self._wound_up_at_s > SLACK * self._timeout_s:
            after_s = (1 + SLACK) * self._timeout_s if self._is_fatal else self._timeout_s
            faulthandler.dump_traceback_later(after_s, exit=self._is_fatal, file=self._log)
            self._wound_up_at_s = now_s

    def stop(self) -> None:
        """Lets any time pass: no step is running, nor about to."""
        if self._wound_up_at_s is not None:
            faulthandler.cancel_dump_traceback_later()
            self._wound_up_at_s = None
