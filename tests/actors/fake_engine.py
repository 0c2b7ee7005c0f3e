"""An engine without a model: each prompt says what shall happen to it, so that tests are ordered by events.

steps N            finishes in its Nth step
gate PATH          finishes in the first step after PATH exists
refuse             is refused by add_request
bug                makes add_request raise an error that is nobody's fault but ours
crash              makes step raise
exit               ends the process in the step that runs it
hang               makes step never return
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from millrace.actors import EnginePool, PoolConfig
from millrace.actors.replica.watchdog import StepWatchdog
from millrace.engine.errors import ConfigError, EmptyPromptError
from millrace.engine.outputs import CompletionOutput, RequestOutput
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams

STEP_S = 0.002


class FakeEngine:
    """Obeys its prompts.

    Args:
        engine_kwargs: `starts`: file that gets a line per start. `fail_start`: kind of failure. `num_failing_starts`:
            how many starts fail that way. `fail_rank`: whether the other ranks refuse to load.
        num_sharing: Ranks on its node.
    """

    def __init__(
        self, engine_kwargs: dict[str, Any], num_sharing: int = 1, announce: Callable[[str], None] | None = None
    ) -> None:
        if announce is not None:
            announce("nowhere")
        if engine_kwargs.get("fail_rank"):
            threading.Event().wait()  # for the other ranks
        self._num_steps_left: dict[str, int] = {}
        self._requests: dict[str, GenerateRequest] = {}
        self._thread = threading.current_thread()
        self.num_sharing = num_sharing
        self.num_aborted = 0
        self.num_steps = 0
        self.is_closed = False
        if "starts" in engine_kwargs:
            self._start(Path(engine_kwargs["starts"]), engine_kwargs)

    def _start(self, starts: Path, engine_kwargs: dict[str, Any]) -> None:
        with starts.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(starts.read_text().splitlines()) > engine_kwargs.get("num_failing_starts", 1000):
            return
        match engine_kwargs.get("fail_start"):
            case "config":
                raise ConfigError("model 'nowhere' is not a folder; pass the folder of a model")
            case "error":
                raise RuntimeError("no luck\nwith this device")
            case "unpicklable":
                raise UnpicklableError(threading.Lock())
            case "exit":
                os._exit(3)

    def add_request(self, request: GenerateRequest) -> None:
        self._check_thread()
        assert request.request_id not in self._requests
        assert request.prompt is not None
        verb, *rest = request.prompt.split()
        if verb == "refuse":
            raise EmptyPromptError("the prompt has no token; give it at least one")
        if verb == "bug":
            raise ZeroDivisionError("integer division by zero")
        self._requests[request.request_id] = request
        self._num_steps_left[request.request_id] = int(rest[0]) if verb == "steps" else 1

    def abort(self, request_ids: Iterable[str]) -> None:
        self._check_thread()
        for request_id in list(request_ids):
            self.num_aborted += self._requests.pop(request_id, None) is not None

    def step(self) -> list[RequestOutput]:
        self._check_thread()
        assert self._requests, "an idle engine was stepped"
        self.num_steps += 1
        time.sleep(STEP_S)
        finished = [request for request in self._requests.values() if self._advance(request)]
        for request in finished:
            del self._requests[request.request_id]
        return [_output(request) for request in finished]

    def _advance(self, request: GenerateRequest) -> bool:
        assert request.prompt is not None
        verb, *rest = request.prompt.split()
        if verb == "gate":
            return Path(rest[0]).exists()
        if verb == "crash":
            raise RuntimeError("the device fell over")
        if verb == "exit":
            os._exit(3)
        if verb == "hang":
            threading.Event().wait()
        self._num_steps_left[request.request_id] -= 1
        return not self._num_steps_left[request.request_id]

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def stats(self) -> dict[str, int]:
        self._check_thread()
        return {
            "num_running": len(self._requests),
            "num_aborted": self.num_aborted,
            "num_steps": self.num_steps,
            "num_sharing": self.num_sharing,
        }

    def close(self) -> None:
        self._check_thread()
        self.is_closed = True

    def _check_thread(self) -> None:
        assert threading.current_thread() is self._thread, "the engine was touched from another thread"


def run_rank(
    engine_kwargs: dict[str, Any], num_sharing: int, rank: int, address: str, watchdog: StepWatchdog | None
) -> None:
    """A rank that is there and has nothing to do."""
    assert rank and address == "nowhere"
    if engine_kwargs.get("fail_rank"):
        raise ConfigError(f"rank {rank} has no such device")
    threading.Event().wait()


def hang_in_a_step(
    engine_kwargs: dict[str, Any], num_sharing: int, rank: int, address: str, watchdog: StepWatchdog | None
) -> None:
    """A rank whose first step never ends."""
    assert watchdog is not None
    watchdog.before_step()
    threading.Event().wait()


def start_pool(**settings: Any) -> EnginePool:
    """Starts a pool of fake engines."""
    defaults: dict[str, Any] = {
        "engine_kwargs": {},
        "num_cpus_per_replica": 0,
        "start_backoff_s": 0.01,
        "engine_factory": FakeEngine,
        "rank_main": run_rank,
    }
    return EnginePool.start(PoolConfig(**(defaults | settings)))


class UnpicklableError(Exception):
    """An error that cannot cross to another process."""


def _output(request: GenerateRequest) -> RequestOutput:
    text = f"{request.prompt}: done"
    completion = CompletionOutput(0, text, [1, 2], finish_reason="stop")
    return RequestOutput(request.request_id, request.prompt, [0], None, [completion], True)


def request(request_id: str, prompt: str) -> GenerateRequest:
    """Makes a request that the fake engine understands."""
    return GenerateRequest(request_id, prompt, None, SamplingParams())


def requests(prompt: str, count: int, prefix: str = "") -> list[GenerateRequest]:
    """Makes requests that all do the same."""
    return [request(f"{prefix}{index}", prompt) for index in range(count)]
