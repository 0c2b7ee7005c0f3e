"""`Stopping`: Ctrl-C, SIGTERM and SIGHUP end a command by an exception that closes everything.

A terminal that goes away sends SIGHUP, often twice: by the shell and by the system. The second one is ignored, so that
it does not interrupt what the first one has begun to close.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANGUP = getattr(signal, "SIGHUP", None)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopping:
    """The handler of the signals that stop a command, which remembers the first of them.

    The exception alone cannot tell which signal came: Ray replaces a `KeyboardInterrupt` by another one. And while Ray
    starts, its own handler of SIGTERM is in force, which raises `SystemExit`.
    """

    def __init__(self) -> None:
        self._number: int | None = None

    def heed_signals(self) -> None:
        """Sets the handlers, and again after Ray, which sets its own. Ignored signals stay ignored."""
        if threading.current_thread() is threading.main_thread():
            for one in SIGNALS:
                if signal.getsignal(one) is not signal.SIG_IGN:  # nohup ignores SIGHUP.
                    signal.signal(one, self._stop)

    @property
    def has_come(self) -> bool:
        """Whether one of the signals has come."""
        return self._number is not None

    def status(self, stopped: KeyboardInterrupt | SystemExit) -> int:
        """Returns the exit status of a process that a signal has ended: 128 + the number of the signal.

        Args:
            stopped: The exception that has ended the command.
        """
        if self._number is None:
            self._number = signal.SIGTERM if isinstance(stopped, SystemExit) else signal.SIGINT
        return 128 + self._number

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number
        if number == HANGUP:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt


@contextmanager
def stop_on_signals() -> Iterator[Stopping]:
    """Raises `KeyboardInterrupt` in the main thread when one of the signals comes during the block."""
    former = {one: signal.getsignal(one) for one in SIGNALS}
    stopping = Stopping()
    stopping.heed_signals()
    try:
        yield stopping
    finally:
        if threading.current_thread() is threading.main_thread():
            for one, handler in former.items():
                signal.signal(one, handler if handler is not None else signal.SIG_DFL)


def ignore_signals() -> None:
    """Ignores the signals of `stop_on_signals`, once everything is closed and the process is to end."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
