"""`EngineThread`: the thread that runs an engine. An inbox takes requests in, and callbacks deliver finished outputs.

Only this thread touches the engine, so the engine needs no lock. This module knows nothing of Ray.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ...engine.errors import UserError
from ...engine.request import EngineOutput, Request
from .watchdog import StepWatchdog

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Engine(Protocol):
    """The methods that a replica calls on an engine; `LLMEngine` has them, and so have the engines of tests."""

    def add_request(self, request: Request) -> None:
        """Queues a request, which `step` then runs; raises an error if the request cannot be run."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """Removes unfinished requests; they give no output."""

    def step(self) -> list[EngineOutput]:
        """Runs one step and returns the outputs of the requests that finished or failed."""

    def has_unfinished_requests(self) -> bool:
        """Returns whether there are requests without an output, so that `step` must be called again."""

    def stats(self) -> Any:
        """Returns the counters of the engine as plain data."""

    def close(self) -> None:
        """Frees the memory and the processes of the engine."""


@dataclass(slots=True, eq=False)
class Submission:
    """The requests of one call and the function that takes their outputs.

    Attributes:
        requests: All requests of the call.
        deliver: Function that takes finished outputs; it is called on the thread of the engine.
        unfinished: Ids of the unfinished requests that the engine has accepted.
    """

    requests: list[Request]
    deliver: Callable[[list[EngineOutput]], None]
    unfinished: set[str] = field(default_factory=set)


class EngineThread:
    """Builds an engine on a thread of its own and runs it there.

    Other threads put messages into an inbox. The thread waits for a message while the engine has no requests; otherwise
    it empties the inbox between two steps. An engine refuses a request whose id another unfinished request has. Two
    callers may use the same id, and a new id would change the draws (the seed of a request may follow from its id), so
    the later request is held back until the earlier one has ended.

    Args:
        build: Function that makes the engine; it is called on the thread.
        on_fatal: Function that is called on the thread when the engine itself fails, after the traceback was logged.
        watchdog: Watchdog that runs during steps and is stopped while the engine is idle; None for no watchdog.

    Attributes:
        loaded: Future that is done when the engine is built; it holds the exception if the build failed.
    """

    def __init__(
        self, build: Callable[[], Engine], on_fatal: Callable[[], None], watchdog: StepWatchdog | None = None
    ) -> None:
        self._build = build
        self._on_fatal = on_fatal
        self._watchdog = watchdog
        self._inbox: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._owners: dict[str, Submission] = {}
        self._held_back: list[tuple[Submission, Request]] = []
        self._is_closing = False
        self.loaded: Future[None] = _uncancellable_future()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, requests: list[Request], deliver: Callable[[list[EngineOutput]], None]) -> Submission:
        """Hands requests to the engine, and returns at once.

        A request that the engine refuses is delivered at once, as an output with an error.

        Args:
            requests: Requests with different ids.
            deliver: Function that takes finished outputs, possibly in many calls. It runs on the engine's thread and
                must not block.

        Returns:
            The submission, which `abort` takes.
        """
        submission = Submission(requests, deliver)
        self._inbox.put(lambda engine: self._add(engine, submission))
        return submission

    def abort(self, submission: Submission) -> None:
        """Removes the unfinished requests of a submission from the engine; their outputs are not delivered."""
        self._inbox.put(lambda engine: self._drop(engine, submission))

    def ask(self, question: Callable[[Engine], T]) -> Future[T]:
        """Lets the thread call a function with the engine between two steps, and returns at once.

        Args:
            question: Function of the engine; it must not raise.

        Returns:
            A future of the function's result, done when the engine is loaded and the running step has ended.
        """
        answer: Future[T] = _uncancellable_future()
        self._inbox.put(lambda engine: answer.set_result(question(engine)))
        return answer

    def close(self) -> Future[None]:
        """Closes the engine after the running step and ends the thread, without outputs of unfinished requests."""
        return self.ask(self._close)

    def _close(self, engine: Engine) -> None:
        if not self._is_closing:
            self._is_closing = True
            engine.close()

    def _run(self) -> None:
        try:
            engine = self._build()
        except Exception as exc:  # Any error that keeps a model from loading is passed to the callers that wait for it.
            if not isinstance(exc, UserError):
                logger.exception("the engine did not start")
            self.loaded.set_exception(exc)
            return
        self.loaded.set_result(None)
        try:
            while not self._is_closing:
                self._take_in(engine)
                if not self._is_closing and engine.has_unfinished_requests():
                    if self._watchdog:
                        self._watchdog.before_step()
                    self._hand_out(engine, engine.step())
            if self._watchdog:
                self._watchdog.stop()
        except BaseException:
            logger.critical("the engine failed: its process ends and its requests go elsewhere", exc_info=True)
            self._on_fatal()

    def _take_in(self, engine: Engine) -> None:
        """Runs all messages of the inbox; waits for a first message if the engine has no requests."""
        if not engine.has_unfinished_requests():
            if self._watchdog:
                self._watchdog.stop()
            self._inbox.get()(engine)
        while not self._is_closing:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            message(engine)

    def _add(self, engine: Engine, submission: Submission) -> None:
        for request in submission.requests:
            self._admit(engine, submission, request)

    def _admit(self, engine: Engine, submission: Submission, request: Request) -> None:
        if request.request_id in self._owners:
            self._held_back.append((submission, request))
            return
        try:
            engine.add_request(request)
        except Exception as exc:  # An error of one request must not stop the other requests.
            if not isinstance(exc, UserError):
                logger.exception("request %r was not taken in", request.request_id)
            output = request.failed(exc)
            submission.deliver([output])
        else:
            submission.unfinished.add(request.request_id)
            self._owners[request.request_id] = submission

    def _admit_held_back(self, engine: Engine) -> None:
        held_back, self._held_back = self._held_back, []
        for submission, request in held_back:
            self._admit(engine, submission, request)

    def _drop(self, engine: Engine, submission: Submission) -> None:
        if submission.unfinished:
            engine.abort(submission.unfinished)
        for request_id in submission.unfinished:
            del self._owners[request_id]
        submission.unfinished.clear()
        self._held_back = [(owner, request) for owner, request in self._held_back if owner is not submission]
        self._admit_held_back(engine)

    def _hand_out(self, engine: Engine, outputs: list[EngineOutput]) -> None:
        finished: dict[Submission, list[EngineOutput]] = {}
        for output in outputs:
            submission = self._owners.pop(output.request_id)
            submission.unfinished.remove(output.request_id)
            finished.setdefault(submission, []).append(output)
        for submission, chunk in finished.items():
            submission.deliver(chunk)
        self._admit_held_back(engine)


def _uncancellable_future() -> Future[Any]:
    """Returns a future in the state running, which a caller that stops waiting cannot cancel for other callers."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
