"""Requests that kill, and engines that die of anything."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from fake_engine import FakeEngine, hang_in_a_step, request, requests
from ray.exceptions import ActorDiedError

from millrace.actors import EnginePool, EngineReplica, PoolClient
from millrace.actors.replica.replica import ReplicaSettings
from millrace.actors.replica.worker import EngineWorker
from millrace.engine.errors import EngineDeadError

Start = Callable[..., EnginePool]
Eventually = Callable[[Callable[[], Any]], None]


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_poison_is_a_dead_letter_after_two_deaths_and_every_other_row_is_there(
    start_pool: Start, num_replicas: int
) -> None:
    pool = start_pool(num_replicas=num_replicas)
    pool.wait_ready()
    sent = [*requests("steps 3", 60), request("poison", "exit"), *requests("steps 2", 60, "late")]
    outputs = list(PoolClient(pool.name).generate(sent))
    assert sorted(output.request_id for output in outputs) == sorted(one.request_id for one in sent)
    (bad,) = [output for output in outputs if output.error]
    assert (bad.request_id, bad.metrics.attempt) == ("poison", 2)
    assert bad.error is not None
    assert bad.error.kind == "ReplicaDiedError"
    assert sum(replica.num_restarts for replica in pool.stats().replicas) == 2


def test_poison_among_many_callers_and_strangers_costs_nobody_else(start_pool: Start) -> None:
    pool = start_pool(num_replicas=2)
    pool.wait_ready()
    client = PoolClient(pool.name)

    def call(number: int) -> dict[str, bool]:
        sent = requests("steps 4", 30, f"{number}-")
        sent[11] = request(f"{number}-11", "exit" if number in (1, 4) else "steps 1")
        return {output.request_id: output.error is not None for output in client.generate(sent)}

    with ThreadPoolExecutor(6) as threads:
        failed = {name: bad for rows in threads.map(call, range(6)) for name, bad in rows.items()}
    assert len(failed) == 180
    assert [name for name, bad in failed.items() if bad] == ["1-11", "4-11"]


def test_a_suspect_run_is_closed_early_and_the_pool_goes_on(start_pool: Start, gate: Path) -> None:
    pool = start_pool()
    client = PoolClient(pool.name)
    outputs = client.generate([request("poison", "exit"), request("gated", f"gate {gate}"), request("a", "steps 1")])
    next(outputs)
    outputs.close()
    assert len(list(client.generate(requests("steps 1", 5)))) == 5


def test_an_engine_that_dies_of_everything_ends_the_job_with_an_error(start_pool: Start) -> None:
    pool = start_pool(max_deaths_in_a_row=3)
    with pytest.raises(EngineDeadError, match="3 replicas died one after the other and no request was finished"):
        list(PoolClient(pool.name).generate(requests("exit", 6)))
    assert pool.stats().state == "failed"
    with pytest.raises(EngineDeadError):
        pool.wait_ready()


def test_a_step_that_hangs_kills_its_replica_and_the_log_has_the_stacks(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ReplicaSettings(
        pool_name="p", replica_id="0.0", engine_kwargs={}, engine_factory=FakeEngine, step_timeout_s=0.3
    )
    replica = ray.remote(EngineReplica).options(num_cpus=0, max_concurrency=100).remote(settings)
    pid = ray.get(replica.ready.remote()).pid
    assert [output.request_id for chunk in replica.generate.remote(requests("steps 1", 1)) for output in ray.get(chunk)]
    with pytest.raises(ActorDiedError):
        ray.get(next(iter(replica.generate.remote(requests("hang", 1)))))
    assert "in _advance" in error_log(pid).read_text()


def test_a_rank_that_hangs_in_a_step_writes_its_stacks_and_leaves_the_end_to_rank_0(
    cluster: None, eventually: Eventually
) -> None:
    settings = ReplicaSettings(
        pool_name="p", replica_id="0.0", engine_kwargs={}, rank_main=hang_in_a_step, step_timeout_s=0.3
    )
    worker = ray.remote(EngineWorker).options(num_cpus=0, max_concurrency=10).remote(settings, 1)
    pid = ray.get(worker.where.remote()).pid
    run = worker.run.remote("nowhere")
    eventually(lambda: "in hang_in_a_step" in error_log(pid).read_text())
    assert ray.get(worker.where.remote()).pid == pid
    ray.kill(worker)
    with pytest.raises(ActorDiedError):
        ray.get(run)


def error_log(pid: int) -> Path:
    """Returns where Ray keeps what a worker wrote to its standard error."""
    (log,) = Path(ray._private.worker._global_node.get_logs_dir_path()).glob(f"worker-*-{pid}.err")
    return log


def test_a_row_that_hangs_is_a_dead_letter(start_pool: Start) -> None:
    pool = start_pool(step_timeout_s=0.3)
    outputs = list(PoolClient(pool.name).generate([request("stuck", "hang"), *requests("steps 1", 3)]))
    assert sorted(output.request_id for output in outputs) == ["0", "1", "2", "stuck"]
    assert [output.request_id for output in outputs if output.error] == ["stuck"]
