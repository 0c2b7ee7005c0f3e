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
        """Takes a request in, or raises an error if the request is wrong."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drops unfinished requests."""

    def step(self) -> list[EngineOutput]:
        """Runs one step and returns the requests that finished in it."""

    def has_unfinished_requests(self) -> bool:
        """Returns whether another step would do any work."""

    def stats(self) -> Any:
        """Returns the counters of the engine as plain data."""

    def close(self) -> None:
        """Frees the memory and the processes of the engine."""


@dataclass(slots=True, eq=False)
class Submission:
    """The requests of one call and the function that takes their outputs.

    Attributes:
        requests: All requests of the call.
        deliver: Takes finished outputs; it is called on the thread of the engine.
        unfinished: Ids of the requests that are in the engine.
    """

    requests: list[Request]
    deliver: Callable[[list[EngineOutput]], None]
    unfinished: set[str] = field(default_factory=set)


class EngineThread:
    """Builds an engine on a thread of its own and runs it there.

    The thread sleeps on its inbox while the engine has nothing to do; otherwise it empties the inbox between two steps.
    Two callers may use the same request id, but an engine refuses that. A new id would change the draws (the seed of a
    request may follow from its id), so the later request is held back until the earlier one has ended.

    Args:
        build: Makes the engine. It runs on the thread.
        on_fatal: Called on the thread when the engine itself fails, after the traceback was logged.
        watchdog: Started before each step and stopped while the engine is idle; None for no watchdog.

    Attributes:
        loaded: Resolves when the engine is built; holds the exception if that failed.
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
        """Hands requests to the engine.

        A request that the engine refuses is delivered at once, as an output with an error.

        Args:
            requests: Requests with different ids.
            deliver: Takes finished outputs, possibly in many calls. It runs on the engine's thread and must not block.

        Returns:
            The submission, which `abort` takes.
        """
        submission = Submission(requests, deliver)
        self._inbox.put(lambda engine: self._add(engine, submission))
        return submission

    def abort(self, submission: Submission) -> None:
        """Drops the unfinished requests of a submission; none of its outputs is delivered any more."""
        self._inbox.put(lambda engine: self._drop(engine, submission))

    def ask(self, question: Callable[[Engine], T]) -> Future[T]:
        """Runs a function on the engine between two steps.

        Args:
            question: Reads the engine; it must not raise.

        Returns:
            Its result, once the engine is loaded and the step that is running has ended.
        """
        answer: Future[T] = _uncancellable_future()
        self._inbox.put(lambda engine: answer.set_result(question(engine)))
        return answer

    def close(self) -> Future[None]:
        """Ends the thread after the present step and closes the engine; unfinished requests are dropped."""
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
        """Runs all messages of the inbox; waits for one only if the engine has nothing to do."""
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
    """Returns a running future: a caller that stops waiting for it cannot cancel it for the others."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
