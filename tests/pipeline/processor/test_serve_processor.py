"""Datasets through a real deployment of Ray Serve; runs where `ray[serve]` is installed."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import ray.data
from ray import cloudpickle

from millrace import ConfigError
from millrace.pipeline import ServeDeploymentProcessorConfig, build_llm_processor

serve = pytest.importorskip("ray.serve", exc_type=ImportError)
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Ask:
    """A request with a class."""

    def __init__(self, text: str, **rest: Any) -> None:
        self.text = text


class Shouter:
    """Answers in capitals."""

    async def stream(self, request: Ask) -> AsyncIterator[dict[str, str]]:
        if not request.text:
            raise ValueError("nothing to shout")
        yield {"shout": request.text.upper()}
        yield {"shout": "never seen"}

    async def once(self, request: dict[str, Any]) -> dict[str, str]:
        return {"shout": request["text"].upper()}


@pytest.fixture(scope="module")
def deployment() -> Iterator[None]:
    if not ray.is_initialized():
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"location": "NoServer"}, logging_config={"log_level": "ERROR"})
    actor = {"num_cpus": 0.1}
    serve.run(serve.deployment(Shouter, ray_actor_options=actor).bind(), name="mill", route_prefix=None)
    yield
    serve.shutdown()


def settings(**changes: Any) -> ServeDeploymentProcessorConfig:
    fields = {"deployment_name": "Shouter", "app_name": "mill", "dtype_mapping": {"Ask": Ask}, "batch_size": 4}
    return ServeDeploymentProcessorConfig(**{**fields, "should_continue_on_error": True, **changes})


def ask(method: str, dtype: str | None) -> Any:
    return lambda row: {"method": method, "dtype": dtype, "request_kwargs": {"text": row["text"]}}


@pytest.mark.parametrize(("method", "dtype", "stream"), [("stream", "Ask", True), ("once", None, False)])
def test_rows_through_a_deployment(
    cluster: None, deployment: None, method: str, dtype: str | None, stream: bool
) -> None:
    rows = [{"id": index, "text": f"t{index}" if index else ""} for index in range(10)]
    config = settings(stream=stream)
    with build_llm_processor(config, ask(method, dtype), lambda row: {"id": row["id"], "shout": row["shout"]}) as mill:
        out = sorted(mill(ray.data.from_items(rows)).take_all(), key=lambda row: row["id"])
    assert [row["shout"] for row in out[1:]] == [f"T{index}" for index in range(1, 10)]
    said = "serve_deployment: ValueError: " if stream else ""
    assert out[0]["__inference_error__"].startswith(said)
    assert bool(out[0]["__inference_error__"]) is stream


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"app_name": "mil"}, "runs no application 'mil'; it runs: mill"),
        ({"deployment_name": "Shout"}, "has no deployment 'Shout'; it has: Shouter"),
    ],
)
def test_what_is_not_there_is_said_at_once(cluster: None, deployment: None, changes: dict[str, str], said: str) -> None:
    with build_llm_processor(settings(**changes)) as processor, pytest.raises(ConfigError, match=said):
        processor(ray.data.range(1))
