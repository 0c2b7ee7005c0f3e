"""Requests through a pool: exactly once, whatever dies on the way."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_engine
import pytest
import ray
from fake_engine import request, requests

from millrace.actors import EnginePool, PoolClient
from millrace.engine.errors import UserError
from millrace.engine.outputs import RequestOutput

Start = Callable[..., EnginePool]
Eventually = Callable[[Callable[[], object]], None]


def ids(outputs: list[RequestOutput]) -> list[str]:
    return sorted(output.request_id for output in outputs)


def num_running(pool: EnginePool) -> int:
    return sum(replica.engine["num_running"] for replica in pool.stats(with_engines=True).replicas if replica.engine)


@pytest.fixture(scope="module")
def standing_pools() -> Iterator[list[EnginePool]]:
    """The pool that the tests of this module share, once the first of them has started it."""
    pools: list[EnginePool] = []
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def ready_pool(cluster: None, standing_pools: list[EnginePool]) -> EnginePool:
    """Two replicas that are up, and that no test kills."""
    if not standing_pools:
        standing_pools.append(fake_engine.start_pool(num_replicas=2))
        standing_pools[0].wait_ready()
    return standing_pools[0]


@pytest.fixture
def doomed_pool(start_pool: Start) -> EnginePool:
    """Two replicas that are up, for a test that kills them."""
    pool = start_pool(num_replicas=2)
    pool.wait_ready()
    return pool


def test_outputs_come_as_they_finish_from_all_replicas(ready_pool: EnginePool, gate: Path) -> None:
    client = PoolClient(ready_pool.name)
    outputs = client.generate([*requests(f"gate {gate}", 4, "slow"), *requests("steps 1", 4, "fast")])
    fast = [next(outputs) for _ in range(4)]
    assert ids(fast) == ["fast0", "fast1", "fast2", "fast3"]
    assert {output.outputs[0].text for output in fast} == {"steps 1: done"}
    gate.touch()
    slow = list(outputs)
    assert ids(slow) == ["slow0", "slow1", "slow2", "slow3"]
    assert Counter(output.metrics.replica_id for output in [*fast, *slow]) == {"0.0": 4, "1.0": 4}
    assert {output.metrics.attempt for output in [*fast, *slow]} == {1}


def test_refused_requests_are_rows_beside_the_others(ready_pool: EnginePool) -> None:
    outputs = list(PoolClient(ready_pool.name).generate([*requests("refuse", 2, "bad"), *requests("steps 2", 2)]))
    assert ids(outputs) == ["0", "1", "bad0", "bad1"]
    assert {o.request_id: o.error.kind for o in outputs if o.error} == dict.fromkeys(
        ["bad0", "bad1"], "EmptyPromptError"
    )


def test_same_id_twice_is_refused(ready_pool: EnginePool) -> None:
    with pytest.raises(UserError, match=r"given twice or more: a$"):
        next(PoolClient(ready_pool.name).generate([request("a", "steps 1"), request("a", "steps 1")]))


def test_no_requests_give_no_outputs(ready_pool: EnginePool) -> None:
    assert list(PoolClient(ready_pool.name).generate([])) == []


def test_closing_early_takes_back_what_is_unfinished(
    ready_pool: EnginePool, gate: Path, eventually: Eventually
) -> None:
    client = PoolClient(ready_pool.name)
    outputs = client.generate([*requests(f"gate {gate}", 6), request("fast", "steps 1")])
    assert next(outputs).request_id == "fast"
    eventually(lambda: num_running(ready_pool) == 6)
    outputs.close()
    eventually(lambda: num_running(ready_pool) == 0)
    replicas = ready_pool.stats(with_engines=True).replicas
    assert sum(replica.engine["num_aborted"] for replica in replicas) == 6
    assert ids(list(client.generate(requests("steps 1", 3)))) == ["0", "1", "2"]


def test_threads_and_clients_do_not_mix_up_their_requests(ready_pool: EnginePool) -> None:
    clients = [PoolClient(ready_pool.name), PoolClient(ready_pool.name)]

    def call(number: int) -> list[RequestOutput]:
        # The same ids in every call: each must get its own.
        sent = [request(str(index), f"steps {number + 1}") for index in range(20)]
        return list(clients[number % 2].generate(sent))

    with ThreadPoolExecutor(8) as threads:
        for number, outputs in enumerate(threads.map(call, range(8))):
            assert ids(outputs) == sorted(str(index) for index in range(20))
            assert {output.outputs[0].text for output in outputs} == {f"steps {number + 1}: done"}


def test_client_in_a_worker_finds_the_pool_and_its_death_frees_the_replicas(
    ready_pool: EnginePool, gate: Path, eventually: Eventually
) -> None:
    @ray.remote(num_cpus=0)
    class Worker:
        def work(self, name: str, path: str) -> tuple[str, int]:
            sent = [*requests(f"gate {path}", 4), request("fast", "steps 1")]
            self._outputs = PoolClient(name).generate(sent)
            return next(self._outputs).request_id, os.getpid()

    first, pid = ray.get(Worker.remote().work.remote(ready_pool.name, str(gate)))
    assert first == "fast"
    eventually(lambda: num_running(ready_pool) == 4)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: num_running(ready_pool) == 0)


def test_killed_replica_loses_and_doubles_nothing(doomed_pool: EnginePool, gate: Path, eventually: Eventually) -> None:
    outputs = PoolClient(doomed_pool.name).generate(
        [*requests("steps 1", 50, "early"), *requests(f"gate {gate}", 50, "late")]
    )
    early = [next(outputs) for _ in range(50)]
    eventually(lambda: num_running(doomed_pool) == 50)
    os.kill(doomed_pool.stats().replicas[0].pid, signal.SIGKILL)
    gate.touch()
    late = list(outputs)
    assert ids([*early, *late]) == sorted(f"{when}{index}" for when in ("early", "late") for index in range(50))
    assert Counter(output.metrics.attempt for output in late) == {1: 25, 2: 25}
    assert not [output for output in late if output.error]


def test_requests_survive_repeated_kills(start_pool: Start, gate: Path, eventually: Eventually) -> None:
    pool = start_pool(max_attempts=4)
    with ThreadPoolExecutor(1) as thread:
        # Asked before a replica is up: it waits.
        results = thread.submit(lambda: list(PoolClient(pool.name).generate(requests(f"gate {gate}", 10))))
        for restarts, count in enumerate([10, 1, 1]):  # all, then one alone, twice
            eventually(lambda: pool.stats().replicas[0].num_restarts == restarts and num_running(pool) == count)  # noqa: B023
            os.kill(pool.stats().replicas[0].pid, signal.SIGKILL)
        eventually(lambda: pool.stats().replicas[0].num_restarts == 3 and num_running(pool) == 1)
        gate.touch()
        outputs = results.result()
    assert ids(outputs) == [str(index) for index in range(10)]
    assert {output.metrics.replica_id for output in outputs} == {"0.3"}
    assert Counter(output.metrics.attempt for output in outputs) == {2: 9, 4: 1}
    assert not [output for output in outputs if output.error]


@pytest.mark.parametrize("poison", ["exit", "crash"])
def test_request_that_kills_replicas_is_given_up(start_pool: Start, poison: str) -> None:
    pool = start_pool(max_attempts=2)
    client = PoolClient(pool.name)
    (output,) = client.generate([request("poison", poison)])
    assert output.error is not None
    assert output.error.kind == "ReplicaDiedError"
    assert "2 replica(s) died with request 'poison' on board" in output.error.message
    assert output.error.retryable
    assert output.outputs[0].finish_reason == "error"
    assert (output.metrics.attempt, output.metrics.replica_id) == (2, "0.1")
    assert ids(list(client.generate(requests("steps 1", 2)))) == ["0", "1"]


def test_restarted_replica_gets_work_again(doomed_pool: EnginePool, eventually: Eventually) -> None:
    client = PoolClient(doomed_pool.name)
    os.kill(doomed_pool.stats().replicas[0].pid, signal.SIGKILL)
    eventually(lambda: doomed_pool.stats().replicas[0].num_restarts == 1)
    doomed_pool.wait_ready()
    eventually(lambda: {o.metrics.replica_id for o in client.generate(requests("steps 1", 4))} == {"0.1", "1.0"})
