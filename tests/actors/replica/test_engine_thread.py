"""The thread that owns an engine, without Ray."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, request, requests

from millrace.actors.replica.engine_thread import EngineThread
from millrace.engine.config import EngineConfig
from millrace.engine.engine import LLMEngine
from millrace.engine.errors import ConfigError
from millrace.engine.executor.executor import StepHandle
from millrace.engine.outputs import RequestOutput
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.step_plan import StepPlan

TIMEOUT_S = 30


class Inbox:
    """Collects what is delivered."""

    def __init__(self) -> None:
        self.chunks: queue.Queue[list[RequestOutput]] = queue.Queue()

    def ids(self, count: int) -> list[str]:
        """Waits for outputs and returns their request ids."""
        found: list[str] = []
        while len(found) < count:
            found += [output.request_id for output in self.chunks.get(timeout=TIMEOUT_S)]
        return found


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def start() -> Iterator[Callable[..., EngineThread]]:
    threads: list[EngineThread] = []

    def build(**engine_kwargs: object) -> EngineThread:
        threads.append(EngineThread(lambda: FakeEngine(engine_kwargs), on_fatal=lambda: None))
        return threads[-1]

    yield build
    for thread in threads:
        if not thread.loaded.exception(TIMEOUT_S):
            thread.close().result(TIMEOUT_S)


def test_requests_come_back_as_they_finish(start: Callable[..., EngineThread], inbox: Inbox) -> None:
    sent = [request("slow", "steps 9"), request("fast", "steps 1"), request("mid", "steps 5")]
    start().submit(sent, inbox.chunks.put)
    assert inbox.ids(3) == ["fast", "mid", "slow"]


def test_requests_are_taken_in_while_others_run(start: Callable[..., EngineThread], inbox: Inbox, gate: Path) -> None:
    thread = start()
    thread.submit([request("running", f"gate {gate}")], inbox.chunks.put)
    thread.submit([request("later", "steps 1")], inbox.chunks.put)
    assert inbox.ids(1) == ["later"]
    gate.touch()
    assert inbox.ids(1) == ["running"]


@pytest.mark.parametrize(("prompt", "kind"), [("refuse", "EmptyPromptError"), ("bug", "ZeroDivisionError")])
def test_request_that_is_not_taken_in_is_an_output_with_an_error(
    start: Callable[..., EngineThread], inbox: Inbox, prompt: str, kind: str
) -> None:
    start().submit([request("bad", prompt), request("good", "steps 1")], inbox.chunks.put)
    (bad,), (good,) = inbox.chunks.get(timeout=TIMEOUT_S), inbox.chunks.get(timeout=TIMEOUT_S)
    assert bad.request_id == "bad"
    assert bad.error is not None
    assert bad.error.kind == kind
    assert bad.outputs[0].finish_reason == "error"
    assert good.request_id == "good"
    assert good.error is None


def test_aborted_submission_delivers_nothing_more(start: Callable[..., EngineThread], inbox: Inbox, gate: Path) -> None:
    thread = start()
    submission = thread.submit(requests(f"gate {gate}", 3), inbox.chunks.put)
    thread.abort(submission)
    assert thread.ask(lambda engine: engine.stats()).result(TIMEOUT_S)["num_aborted"] == 3
    gate.touch()
    thread.submit([request("next", "steps 2")], inbox.chunks.put)
    assert inbox.ids(1) == ["next"]


def test_same_id_from_two_callers_runs_one_after_the_other(
    start: Callable[..., EngineThread], inbox: Inbox, gate: Path
) -> None:
    thread, second = start(), Inbox()
    thread.submit([request("a", f"gate {gate}")], inbox.chunks.put)
    thread.submit([request("a", "steps 1")], second.chunks.put)
    thread.submit([request("b", "steps 1")], inbox.chunks.put)
    assert inbox.ids(1) == ["b"]
    assert second.chunks.empty()
    gate.touch()
    assert inbox.ids(1) == ["a"]
    assert second.ids(1) == ["a"]


def test_held_back_request_runs_when_the_earlier_is_aborted(
    start: Callable[..., EngineThread], inbox: Inbox, gate: Path
) -> None:
    thread, second, third = start(), Inbox(), Inbox()
    earlier = thread.submit([request("a", f"gate {gate}")], inbox.chunks.put)
    dropped = thread.submit([request("a", "steps 1")], second.chunks.put)
    thread.submit([request("a", "steps 1")], third.chunks.put)
    thread.abort(dropped)
    thread.abort(earlier)
    assert third.ids(1) == ["a"]
    assert inbox.chunks.empty()
    assert second.chunks.empty()


def test_idle_engine_is_not_stepped(start: Callable[..., EngineThread], inbox: Inbox) -> None:
    thread = start()
    thread.submit([request("a", "steps 3")], inbox.chunks.put)
    inbox.ids(1)
    # Each question wakes the thread once; a step for nothing fails in the fake engine.
    answers = [thread.ask(lambda engine: engine.stats()).result(TIMEOUT_S)["num_steps"] for _ in range(3)]
    assert answers == [3, 3, 3]


def test_failure_to_load_is_told(start: Callable[..., EngineThread], tmp_path: Path) -> None:
    thread = start(starts=tmp_path / "starts", fail_start="config")
    assert isinstance(thread.loaded.exception(TIMEOUT_S), ConfigError)


def test_failing_step_is_fatal_and_logged(inbox: Inbox, caplog: pytest.LogCaptureFixture) -> None:
    is_fatal = threading.Event()
    thread = EngineThread(lambda: FakeEngine({}), on_fatal=is_fatal.set)
    thread.submit([request("a", "crash")], inbox.chunks.put)
    assert is_fatal.wait(TIMEOUT_S)
    assert "the device fell over" in caplog.text
    assert inbox.chunks.empty()


class BrokenDevice:
    """An executor of which every step raises, as all do after an illegal access of memory on a GPU."""

    def execute(self, plan: StepPlan) -> StepHandle:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_device_that_runs_no_step_ends_the_replica_and_fails_no_request(
    inbox: Inbox, tiny_model: Callable[[str], Path]
) -> None:
    def build() -> LLMEngine:
        engine = LLMEngine.from_config(EngineConfig(model=str(tiny_model("llama")), dtype="float32", device="cpu"))
        engine.executor.close()
        engine.executor = BrokenDevice()
        return engine

    is_fatal = threading.Event()
    thread = EngineThread(build, on_fatal=is_fatal.set)
    thread.loaded.result()
    params = SamplingParams(max_tokens=4)
    sent = [GenerateRequest(str(index), None, [5, 6 + index], params) for index in range(8)]
    thread.submit(sent, inbox.chunks.put)
    assert is_fatal.wait(TIMEOUT_S)
    assert inbox.chunks.empty(), "the pool runs the requests on another replica"


def test_close_closes_the_engine_once_and_drops_what_runs(inbox: Inbox, gate: Path) -> None:
    engines: list[FakeEngine] = []
    thread = EngineThread(lambda: engines.append(FakeEngine({})) or engines[0], on_fatal=lambda: None)
    thread.submit([request("a", f"gate {gate}")], inbox.chunks.put)
    thread.close().result(TIMEOUT_S)
    assert engines[0].is_closed
    assert inbox.chunks.empty()
