"""`StepWatchdog`: ends a process whose step takes too long."""

from __future__ import annotations

import faulthandler
import sys
import time

SLACK = 0.1
"""Share of the limit by which a step may exceed it, so that the timer need not be restarted at every short step."""

NUM_FIRST_STEPS, FIRST_STEPS_FACTOR = 8, 5
"""The first steps of a process may take longer by this factor: they compile the kernels that are not compiled yet."""


class StepWatchdog:
    """Writes the stacks of this process's threads to its log when a step takes too long, and ends the process.

    The timer is the one of `faulthandler`, a thread in C: it fires even while a stuck kernel holds the interpreter's
    lock. A process has one such timer, so it can have one watchdog.

    Args:
        timeout_s: Most seconds of a step. Each of the first eight steps may take five times as long.
        is_fatal: Whether a step that takes too long ends the process. It is True in rank 0; the other ranks only write
            their stacks, a little earlier, and end when rank 0 has ended.
    """

    def __init__(self, timeout_s: float, *, is_fatal: bool = True) -> None:
        self._timeout_s = timeout_s
        self._is_fatal = is_fatal
        assert sys.__stderr__ is not None  # In a Ray worker it is the log of the worker.
        self._log = sys.__stderr__
        self._num_first_steps = NUM_FIRST_STEPS
        self._wound_up_at_s: float | None = None

    def before_step(self) -> None:
        """Starts the timer for a step that begins; a timer that was started shortly before goes on."""
        if self._num_first_steps:
            self._num_first_steps -= 1
            self._start(FIRST_STEPS_FACTOR * self._timeout_s)
            self._wound_up_at_s = -float("inf")  # The next step starts the timer anew.
        elif self._wound_up_at_s is None or time.monotonic() - self._wound_up_at_s > SLACK * self._timeout_s:
            self._start(self._timeout_s)

    def stop(self) -> None:
        """Stops the timer, because no step is running or about to run."""
        if self._wound_up_at_s is not None:
            faulthandler.cancel_dump_traceback_later()
            self._wound_up_at_s = None

    def _start(self, timeout_s: float) -> None:
        after_s = (1 + SLACK) * timeout_s if self._is_fatal else timeout_s
        faulthandler.dump_traceback_later(after_s, exit=self._is_fatal, file=self._log)
        self._wound_up_at_s = time.monotonic()
