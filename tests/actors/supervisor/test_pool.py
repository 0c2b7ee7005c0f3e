"""Starting, keeping alive and ending the replicas of a pool."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from fake_engine import requests

from millrace.actors import EnginePool, PoolClient, PoolStats
from millrace.engine.errors import ConfigError, EngineDeadError, EngineError

Start = Callable[..., EnginePool]
Eventually = Callable[[Callable[[], object]], None]
IsRunning = Callable[[int], bool]

DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import ray
from ray import cloudpickle
import fake_engine
from millrace.actors import EnginePool, PoolClient, PoolConfig

cloudpickle.register_pickle_by_value(fake_engine)
ray.init(address=sys.argv[2], log_to_driver=False)
config = PoolConfig(
    engine_kwargs={}, num_replicas=2, num_cpus_per_replica=0, engine_factory=fake_engine.FakeEngine
)
pool = EnginePool.start(config)
pool.wait_ready()
outputs = PoolClient(pool.name).generate([fake_engine.request("a", "steps 1"), fake_engine.request("b", "gate never")])
next(outputs)
stats = pool.stats()
print(json.dumps([stats.pid, *(replica.pid for replica in stats.replicas)]), flush=True)
sys.stdin.read()
"""


def pids(stats: PoolStats) -> list[int]:
    return [replica.pid for replica in stats.replicas if replica.pid is not None]


def num_starts(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_pool_is_described(start_pool: Start, is_running: IsRunning) -> None:
    pool = start_pool(num_replicas=2)
    pool.wait_ready()
    stats = pool.stats(with_engines=True)
    assert (stats.name, stats.state, stats.reason) == (pool.name, "ready", None)
    assert [(r.replica_id, r.state, r.num_restarts) for r in stats.replicas] == [
        ("0.0", "ready", 0),
        ("1.0", "ready", 0),
    ]
    assert len(set(pids(stats))) == 2
    assert all(is_running(pid) for pid in [stats.pid, *pids(stats)])
    assert [replica.engine["num_running"] for replica in stats.replicas] == [0, 0]
    assert [replica.engine["num_sharing"] for replica in stats.replicas] == [2, 2]
    assert [replica.engine for replica in pool.stats().replicas] == [None, None]


def test_dead_replica_is_started_again_and_the_other_left_alone(start_pool: Start, eventually: Eventually) -> None:
    pool = start_pool(num_replicas=2)
    pool.wait_ready()
    first, second = pids(pool.stats())
    os.kill(first, signal.SIGKILL)
    eventually(lambda: pool.stats().replicas[0].num_restarts == 1 and pool.stats().replicas[0].state == "ready")
    stats = pool.stats()
    assert [replica.replica_id for replica in stats.replicas] == ["0.1", "1.0"]
    assert stats.replicas[0].pid not in (first, second)
    assert stats.replicas[1].pid == second


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("error", "EngineDeadError: RuntimeError: no luck with this device"),
        ("exit", "EngineDeadError: its process ended while the model was loading: "),
    ],
)
def test_start_that_keeps_failing_is_given_up(
    start_pool: Start, tmp_path: Path, is_running: IsRunning, eventually: Eventually, kind: str, reason: str
) -> None:
    starts = tmp_path / "starts"
    pool = start_pool(engine_kwargs={"starts": str(starts), "fail_start": kind}, max_start_failures=2)
    with pytest.raises(EngineDeadError):
        pool.wait_ready()
    stats = pool.stats()
    assert stats.state == "failed"
    assert stats.reason is not None
    assert stats.reason.startswith(reason)
    assert "\n" not in stats.reason
    with pytest.raises(EngineDeadError, match="gave up"):
        next(PoolClient(pool.name).generate(requests("steps 1", 1)))
    assert num_starts(starts) == 2
    eventually(lambda: not any(is_running(int(pid)) for pid in starts.read_text().split()))


def test_error_of_the_user_is_raised_as_it_is_and_not_tried_again(start_pool: Start, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    pool = start_pool(engine_kwargs={"starts": str(starts), "fail_start": "config"}, max_start_failures=5)
    with pytest.raises(ConfigError, match="model 'nowhere' is not a folder"):
        pool.wait_ready()
    assert num_starts(starts) == 1
    with pytest.raises(EngineDeadError, match=r"gave up.*ConfigError: model 'nowhere' is not a folder"):
        next(PoolClient(pool.name).generate(requests("steps 1", 1)))


def test_rank_that_cannot_load_says_why_and_the_replica_is_not_tried_again(start_pool: Start) -> None:
    pool = start_pool(engine_kwargs={"tensor_parallel_size": 2, "fail_rank": True})
    with pytest.raises(ConfigError, match="rank 1 has no such device"):
        pool.wait_ready()
    assert [replica.pids for replica in pool.stats().replicas] == [()]


def test_start_that_fails_at_first_is_tried_again(start_pool: Start, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    pool = start_pool(engine_kwargs={"starts": str(starts), "fail_start": "error", "num_failing_starts": 2})
    pool.wait_ready()
    assert num_starts(starts) == 3
    assert [replica.num_restarts for replica in pool.stats().replicas] == [0]


def test_waiting_too_long_says_so(start_pool: Start) -> None:
    with pytest.raises(EngineError, match=r"is not ready after 0 s: 0\.0 starting"):
        start_pool().wait_ready(timeout_s=0)


def test_close_leaves_no_process_whatever_runs(
    start_pool: Start, gate: Path, is_running: IsRunning, eventually: Eventually
) -> None:
    pool = start_pool(num_replicas=2)
    pool.wait_ready()
    outputs = PoolClient(pool.name).generate([*requests(f"gate {gate}", 4), *requests("steps 1", 1, "fast")])
    next(outputs)
    stats = pool.stats()
    pool.close()
    pool.close()
    eventually(lambda: not any(is_running(pid) for pid in [stats.pid, *pids(stats)]))
    with pytest.raises(EngineDeadError, match="closed"):
        next(outputs)
    with pytest.raises(EngineDeadError, match="closed"):
        pool.stats()
    with pytest.raises(EngineDeadError, match="closed"):
        pool.wait_ready()
    with pytest.raises(EngineDeadError, match="there is no pool"):
        PoolClient(pool.name)


def test_close_ends_replicas_that_are_still_loading(
    start_pool: Start, tmp_path: Path, is_running: IsRunning, eventually: Eventually
) -> None:
    starts = tmp_path / "starts"
    with start_pool(engine_kwargs={"starts": str(starts)}):
        eventually(starts.exists)
    eventually(lambda: not is_running(int(starts.read_text())))


def test_dead_supervisor_takes_its_replicas_along(
    start_pool: Start, gate: Path, is_running: IsRunning, eventually: Eventually
) -> None:
    pool = start_pool(num_replicas=2)
    pool.wait_ready()
    outputs = PoolClient(pool.name).generate([*requests(f"gate {gate}", 4), *requests("steps 1", 1, "fast")])
    next(outputs)
    stats = pool.stats()
    os.kill(stats.pid, signal.SIGKILL)
    eventually(lambda: not any(is_running(pid) for pid in pids(stats)))
    with pytest.raises(EngineDeadError, match="there is no pool"):
        next(outputs)


def test_dead_driver_takes_its_pool_along(cluster: None, is_running: IsRunning, eventually: Eventually) -> None:
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-P", "-c", DRIVER, str(Path(__file__).parent.parent), address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        started = json.loads(driver.stdout.readline())
        assert len(started) == 3
        assert all(is_running(pid) for pid in started)
        driver.kill()
    eventually(lambda: not any(is_running(pid) for pid in started))
