"""One engine in an actor, called directly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from fake_engine import FakeEngine, request, requests
from ray.exceptions import ActorDiedError, TaskCancelledError

from millrace.actors import EngineReplica
from millrace.actors.replica.ranks import build_engine, share_of_cores
from millrace.actors.replica.replica import ReplicaSettings
from millrace.engine import device
from millrace.engine.engine import LLMEngine
from millrace.engine.errors import ConfigError, EngineDeadError


@pytest.fixture
def start_replica(cluster: None) -> Iterator[Callable[..., Any]]:
    actors: list[Any] = []

    def start(**engine_kwargs: Any) -> Any:
        replica_class = ray.remote(EngineReplica).options(num_cpus=0, max_concurrency=100)
        settings = ReplicaSettings(
            pool_name="p", replica_id="0.0", engine_kwargs=engine_kwargs, engine_factory=FakeEngine
        )
        actors.append(replica_class.remote(settings))
        return actors[-1]

    yield start
    for actor in actors:
        ray.kill(actor)


@ray.remote(num_cpus=0)
class Caller:
    """A process that calls a replica and can be killed."""

    def pid(self) -> int:
        return os.getpid()

    def call(self, replica: Any, prompt: str, count: int) -> None:
        self._presence = replica.until_death.remote()
        self._stream = replica.generate.remote(requests(prompt, count, "caller"), [self._presence])


def ids(stream: Any) -> list[str]:
    return [output.request_id for chunk in stream for output in ray.get(chunk)]


def test_outputs_stream_out_as_requests_finish(start_replica: Callable[..., Any], gate: Path) -> None:
    replica = start_replica()
    stream = replica.generate.remote([request("slow", f"gate {gate}"), request("fast", "steps 1")])
    assert [output.request_id for output in ray.get(next(stream))] == ["fast"]
    gate.touch()
    assert ids(stream) == ["slow"]


def test_many_calls_are_open_at_once(start_replica: Callable[..., Any], gate: Path) -> None:
    replica = start_replica()
    waiting = [replica.generate.remote(requests(f"gate {gate}", 2, f"{call}-")) for call in range(20)]
    assert ids(replica.generate.remote([request("alone", "steps 1")])) == ["alone"]
    gate.touch()
    assert sorted(name for stream in waiting for name in ids(stream)) == sorted(
        f"{call}-{index}" for call in range(20) for index in range(2)
    )


def test_call_without_requests_ends_at_once(start_replica: Callable[..., Any]) -> None:
    assert ids(start_replica().generate.remote([])) == []


def test_ready_says_where_it_runs(start_replica: Callable[..., Any], is_running: Callable[[int], bool]) -> None:
    info = ray.get(start_replica().ready.remote())
    assert is_running(info.pid)
    assert info.node_id == ray.get_runtime_context().get_node_id()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("config", ConfigError, "model 'nowhere' is not a folder"),
        ("error", EngineDeadError, "RuntimeError: no luck"),
        ("unpicklable", EngineDeadError, "UnpicklableError: "),
    ],
)
def test_ready_raises_what_kept_the_model_from_loading(
    start_replica: Callable[..., Any], tmp_path: Path, kind: str, error: type[Exception], message: str
) -> None:
    replica = start_replica(starts=tmp_path / "starts", fail_start=kind)
    for _ in range(2):
        with pytest.raises(error, match=message):
            ray.get(replica.ready.remote())


def test_cancelled_call_leaves_no_work(
    start_replica: Callable[..., Any], gate: Path, eventually: Callable[..., None]
) -> None:
    replica = start_replica()
    stream = replica.generate.remote([*requests(f"gate {gate}", 5), request("fast", "steps 1")])
    ray.get(next(stream))
    ray.cancel(stream)
    with pytest.raises(TaskCancelledError):
        ids(stream)
    eventually(lambda: ray.get(replica.stats.remote())[0]["num_aborted"] == 5)


def test_dead_caller_leaves_no_work_and_disturbs_no_other(
    start_replica: Callable[..., Any], gate: Path, eventually: Callable[..., None]
) -> None:
    replica, caller = start_replica(), Caller.remote()
    ray.get(caller.call.remote(replica, f"gate {gate}", 5))
    mine = replica.generate.remote(requests(f"gate {gate}", 2), [replica.until_death.remote()])
    eventually(lambda: ray.get(replica.stats.remote())[0]["num_running"] == 7)
    os.kill(ray.get(caller.pid.remote()), signal.SIGKILL)
    eventually(lambda: ray.get(replica.stats.remote())[0]["num_running"] == 2)
    assert ray.get(replica.stats.remote())[0]["num_aborted"] == 5
    gate.touch()
    assert ids(mine) == ["0", "1"]


def test_engine_that_fails_ends_its_process(
    start_replica: Callable[..., Any], is_running: Callable[[int], bool], eventually: Callable[..., None]
) -> None:
    replica = start_replica()
    pid = ray.get(replica.ready.remote()).pid
    with pytest.raises(ActorDiedError):
        ids(replica.generate.remote([request("a", "crash")]))
    eventually(lambda: not is_running(pid))


@pytest.mark.parametrize(("asked", "num_sharing"), [(None, 1), (None, 2), (5, 1), (5, 2)])
def test_an_engine_gets_its_share_of_the_cores_unless_told_otherwise(
    cluster: None, monkeypatch: pytest.MonkeyPatch, asked: int | None, num_sharing: int
) -> None:
    monkeypatch.setattr(LLMEngine, "from_config", lambda config: config)
    built: Any = build_engine({"model": "m", "num_threads": asked}, num_sharing)
    assert built.num_threads == (asked or share_of_cores(device.num_physical_cores(), 2, num_sharing))


def test_what_a_replica_has_loaded_is_left_out_of_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[str] = []
    monkeypatch.setattr("millrace.actors.replica.replica.gc.freeze", lambda: frozen.append("after the engine was made"))
    settings = ReplicaSettings(pool_name="p", replica_id="0.0", engine_kwargs={}, engine_factory=FakeEngine)
    replica: Any = SimpleNamespace(_settings=settings, _address=None)
    assert isinstance(EngineReplica._build(replica), FakeEngine)
    assert frozen == ["after the engine was made"]
