"""`stop_on_signals`: SIGTERM and SIGHUP end a command as Ctrl-C does, by an exception that closes everything.

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
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class StoppedError(KeyboardInterrupt):
    """A signal has stopped the process. Its argument is the number of the signal."""

    @property
    def status(self) -> int:
        """The exit status of a process that the signal has ended."""
        return 128 + int(self.args[0])


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raises `StoppedError` in the main thread when a signal comes during the block."""
    former = {one: signal.getsignal(one) for one in SIGNALS}
    heed_signals()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for one, handler in former.items():
                signal.signal(one, handler if handler is not None else signal.SIG_DFL)


def heed_signals() -> None:
    """Sets the handlers of `stop_on_signals`, and again after Ray, which sets its own. Ignored signals stay ignored."""
    if threading.current_thread() is threading.main_thread():
        for one in SIGNALS:
            if signal.getsignal(one) is not signal.SIG_IGN:  # nohup ignores SIGHUP.
                signal.signal(one, _stop)


def ignore_signals() -> None:
    """Ignores Ctrl-C and the signals of `stop_on_signals`, once everything is closed and the process is to end."""
    for one in (signal.SIGINT, *SIGNALS):
        signal.signal(one, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    if number == HANGUP:
        signal.signal(number, signal.SIG_IGN)
    raise StoppedError(number)
