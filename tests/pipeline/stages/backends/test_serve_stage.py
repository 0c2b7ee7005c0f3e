"""Rows to a deployment and back: what is asked, what comes of the answer, whose fault an error is.

The deployment here is a stand-in with the handle's interface; `test_serve_processor.py` has a real one.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pydantic
import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from millrace import ConfigError
from millrace.pipeline import DeploymentError, RowFailedError
from millrace.pipeline.processor.request_backend import check_deployment
from millrace.pipeline.stages.backends.serve import ServeDeploymentStage
from millrace.pipeline.stages.base import Row


class Ask(pydantic.BaseModel):
    """A request with a class."""

    model_config = pydantic.ConfigDict(extra="ignore")
    text: str


class Reply(pydantic.BaseModel):
    """An answer with a class."""

    shout: str


class Response:
    """What a handle returns: a stream, or one answer."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items
        self.is_cancelled = False

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def __await__(self) -> Any:
        return anext(self._items).__await__()

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A deployment whose methods are functions of a request; `in_flight` counts what is under way."""

    def __init__(self, **methods: Callable[[Any], Any]) -> None:
        self._methods = methods
        self.stream: bool | None = None
        self.responses: list[Response] = []
        self.requests: list[Any] = []
        self.in_flight = self.max_in_flight = 0

    def options(self, *, stream: bool) -> Handle:
        self.stream = stream
        return self

    def __getattr__(self, name: str) -> Any:
        method = self._methods[name]

        class Method:
            @staticmethod
            def remote(request: Any) -> Response:
                self.requests.append(request)
                self.responses.append(Response(self._answer(method, request)))
                return self.responses[-1]

        return Method

    async def _answer(self, method: Callable[[Any], Any], request: Any) -> AsyncIterator[Any]:
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            answer = method(request)
            answer = await answer if asyncio.iscoroutine(answer) else answer
        finally:
            self.in_flight -= 1
        yield answer


def shout(request: Any) -> dict[str, Any]:
    return {"shout": (request.text if isinstance(request, Ask) else request["text"]).upper()}


def raising(error: Exception) -> Callable[[Any], Any]:
    def method(request: Any) -> Any:
        raise error

    return method


def wrapped(error: Exception) -> Exception:
    """The error as it comes from another process."""
    return RayTaskError("method", "traceback", error)


@pytest.fixture
def make_stage() -> Iterator[Callable[..., ServeDeploymentStage]]:
    stages: list[ServeDeploymentStage] = []

    def make(handle: Handle, **settings: Any) -> ServeDeploymentStage:
        stages.append(ServeDeploymentStage(handle, dtype_mapping={"Ask": Ask}, **settings))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


Make = Callable[..., ServeDeploymentStage]


def row(method: Any = "ask", kwargs: Any = None, **more: Any) -> Row:
    return Row.read({"method": method, "request_kwargs": {"text": "a"} if kwargs is None else kwargs, **more})


def run(stage: ServeDeploymentStage, *rows: Row) -> list[Row]:
    stage.run(rows)
    return list(rows)


@pytest.mark.parametrize("stream", [True, False])
def test_a_row_gets_the_answer_and_where_it_came_from(make_stage: Make, stream: bool) -> None:
    handle = Handle(ask=shout, typed=lambda request: Reply(shout=request.text.upper()))
    rows = run(make_stage(handle, stream=stream), row(id=1), row("typed", {"text": "b"}, dtype="Ask", id=2))
    assert [one.data["shout"] for one in rows] == ["A", "B"]
    assert [one.data["id"] for one in rows] == [1, 2]
    assert {"request_id", "batch_uuid", "time_taken", "request_kwargs"} <= rows[0].data.keys()
    assert handle.stream is stream
    request, typed = handle.requests
    assert (request["text"], request["idx_in_batch"], request["request_id"]) == ("a", 0, rows[0].data["request_id"])
    assert isinstance(typed, Ask)


def test_answers_find_their_rows_and_no_more_are_under_way_than_was_said(make_stage: Make) -> None:
    async def late(request: Any) -> dict[str, Any]:
        for _ in range(20 - request["n"]):
            await asyncio.sleep(0)
        return {"n": request["n"]}

    handle = Handle(ask=late)
    rows = run(make_stage(handle, max_concurrent_requests=5), *(row(kwargs={"n": n}) for n in range(20)))
    assert [one.data["n"] for one in rows] == list(range(20))
    assert handle.max_in_flight == 5


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row(None), "PromptTypeError: column 'method' must name a method of the deployment; got None"),
        (row(kwargs=3), "PromptTypeError: column 'request_kwargs' must be a dict; got int 3"),
        (row(dtype="Aks"), "PromptTypeError: dtype_mapping has no field 'Aks'; did you mean 'Ask'?"),
        (row(kwargs={"txet": 1}, dtype="Ask"), "ValidationError: 1 validation error for Ask"),
        (row("text"), "UserError: text must answer with a dict or a pydantic model; got str"),
        (row("value"), "ValueError: too long"),
        (row("remote"), "TypeError: wrong"),
        (row("slow"), "TimeoutError: slow did not answer within 0.05 s"),
    ],
)
def test_a_request_that_is_refused_fails_its_row_alone(make_stage: Make, bad: Row, said: str) -> None:
    handle = Handle(
        ask=shout,
        text=lambda request: "text",
        value=raising(ValueError("too long")),
        remote=raising(wrapped(TypeError("wrong"))),
        slow=lambda request: asyncio.Event().wait(),
    )
    rows = run(make_stage(handle, request_timeout_s=0.05), row(), Row.read(dict(bad.input)), row())
    assert [one.error is None for one in rows] == [True, False, True]
    assert str(rows[1].error).startswith(f"serve_deployment: {said}")
    assert all(response.is_cancelled for response in handle.responses)


def test_the_first_refused_row_ends_a_job_that_stops(make_stage: Make) -> None:
    with pytest.raises(RowFailedError, match="a row failed in serve_deployment: ValueError: too long"):
        run(make_stage(Handle(ask=raising(ValueError("too long"))), stop_on_error=True), row())


class BackPressureError(Exception):
    """Named like the one of Ray Serve, which may not be installed."""


@pytest.mark.parametrize(
    "error",
    [RayActorError(), BackPressureError("full"), RuntimeError("?"), wrapped(RuntimeError("?")), wrapped(KeyError("k"))],
    ids=["died", "full", "unknown", "unknown there", "key"],
)
def test_what_is_no_rows_fault_ends_the_job(make_stage: Make, error: Exception) -> None:
    with pytest.raises(DeploymentError, match=f"the deployment failed with .*{type(error).__name__}") as caught:
        run(make_stage(Handle(ask=raising(error))), row())
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_ray_without_serve_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ray, "serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(ConfigError, match=r"Ray Serve is not installed .*pip install 'millrace\[serve\]'"):
        check_deployment("Shouter", "mill")
