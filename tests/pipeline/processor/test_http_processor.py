"""Datasets through an HTTP endpoint, on two CPUs, with a real server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
import ray.data
from http_server import Server, running, status
from ray import cloudpickle

from millrace import ConfigError
from millrace.pipeline import HttpRequestProcessorConfig, HttpRequestStageConfig, build_llm_processor
from millrace.pipeline.processor.request_backend import http_backend, make_http_stages

# Workers cannot import from the tests, so what is defined here travels as it is.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as server:
        yield server


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"payload": {"number": row["id"]}}


def keep(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "answer": row["http_response"]["echo"]["number"]}


def test_rows_of_all_blocks_are_under_way_at_once(cluster: None, server: Server) -> None:
    server.hold = 40  # Nothing is answered before the rows of all eight blocks are there.
    config = HttpRequestProcessorConfig(url=server.url, batch_size=5, max_concurrent_requests=40)
    with build_llm_processor(config, ask, keep) as processor:
        rows = processor(ray.data.range(40, override_num_blocks=8)).take_all()
    assert sorted((row["id"], row["answer"]) for row in rows) == [(index, index) for index in range(40)]
    assert server.max_in_flight == 40


def session_of_ones_own() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers={"X-Mill": "yes"})


def test_bad_rows_become_error_rows_and_settings_reach_the_worker(cluster: None, server: Server) -> None:
    server.answers = [status(400, "no such model"), status(503), status(503)]
    config = HttpRequestProcessorConfig(
        url=server.url,
        should_continue_on_error=True,
        max_retries=2,
        base_retry_wait_time_in_s=0.001,
        max_concurrent_requests=1,
        session_factory=session_of_ones_own,
        headers={"X-Number": 3},
    )
    with build_llm_processor(config, ask, keep) as processor:
        rows = processor(ray.data.range(6)).take_all()
    errors = {row["id"]: row["__inference_error__"] for row in rows}
    assert sorted(errors) == list(range(6))
    assert server.max_in_flight == 1
    (said,) = [error for error in errors.values() if error]
    assert said.startswith("http_request: HttpStatusError: ")
    assert "answered 400 Bad Request: 'no such model'" in said
    assert len(server.seen) == 8
    assert {(seen.headers["X-Mill"], seen.headers["X-Number"]) for seen in server.seen} == {("yes", "3")}
    assert "session" not in json.dumps(config.model_dump(mode="json"))


def test_stage_and_pool_are_as_said() -> None:
    config = HttpRequestProcessorConfig(url="http://here", concurrency=4, http_request_stage={"num_cpus": 0.5})
    processor = build_llm_processor(config)
    assert processor.list_stage_names() == ["HttpRequestStage"]
    assert processor.get_stage_by_name("HttpRequestStage").config == HttpRequestStageConfig(num_cpus=0.5)
    kwargs = http_backend(config).resources
    assert (kwargs["compute"].min_size, kwargs["compute"].max_size, kwargs["num_cpus"]) == (4, 4, 0.5)
    pool = http_backend(config.replace(concurrency=(1, 3))).resources["compute"]
    assert (pool.min_size, pool.max_size) == (1, 3)


def test_processes_share_the_limits_of_the_job() -> None:
    config = HttpRequestProcessorConfig(url="http://here", qps=100, max_concurrent_requests=8)
    (stage,) = make_http_stages(config, 4)
    assert stage._throttle._gap_s == pytest.approx(4 / 100)
    assert stage._places._value == 2
    stage.close()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"url": "here"}, "url must begin with http:// or https://; got 'here'"),
        ({"http_request_stage": False}, "cannot be switched off"),
        ({"qps": 0}, "qps: input should be greater than 0; got 0"),
        ({"max_retries": -1}, "max_retries"),
        ({"header": {}}, "did you mean 'headers'?"),
        ({"headers": {"a": [1]}}, "headers"),
        ({"session_factory": 3}, "session_factory"),
        ({"concurrency": 0}, "concurrency must be a positive integer"),
    ],
)
def test_a_mistake_is_said_in_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HttpRequestProcessorConfig(**{"url": "http://here", **fields})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    config = HttpRequestProcessorConfig(
        url="http://me:secret@here/ask?api-key=secret",
        headers={"Authorization": "secret"},
        runtime_env={"env_vars": {"HF_TOKEN": "secret", "MODE": "fast"}},
    )
    assert "secret" not in f"{config!r} {config} {config.model_dump()['headers']}" and "fast" in repr(config)
    assert "secret" not in repr(http_backend(config).info)
    changed = config.replace(qps=3)
    assert changed.headers is not None and changed.headers["Authorization"].get_secret_value() == "secret"


@pytest.mark.parametrize("fields", [{"headers": {"api-key": b"\xffsecret"}}, {"url": "ftp://me:secret@here"}])
def test_a_mistake_is_said_without_the_secret(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        HttpRequestProcessorConfig(**{"url": "http://here", **fields})
    assert "secret" not in str(caught.value)
