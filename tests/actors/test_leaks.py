"""Nothing is left behind: no placement group, no actor, no process, however a job ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray._private.state import actors as all_actors
from ray.util import placement_group_table
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

IsRunning = Callable[[int], bool]
LIMIT_S = 10.0

DRIVER = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import ray, ray.data
from ray import cloudpickle
import fake_engine
from millrace.actors import EnginePool, PoolClient, PoolConfig

cloudpickle.register_pickle_by_value(fake_engine)
ray.init(address=sys.argv[2], log_to_driver=False)
settings = {"engine_factory": fake_engine.FakeEngine, "rank_main": fake_engine.run_rank}
config = PoolConfig(
    engine_kwargs={"tensor_parallel_size": 2}, num_replicas=2, num_cpus_per_replica=0.1, **settings
)

def rows(table):
    sent = [fake_engine.request(str(i), "steps 2") for i in table["id"]]
    yield {"id": [int(output.request_id) for output in PoolClient(pool_name).generate(sent)]}

how = sys.argv[3]
with EnginePool.start(config) as pool:
    pool_name = pool.name
    pool.wait_ready()
    stats = pool.stats()
    print(json.dumps([pool.name, stats.pid, *(pid for replica in stats.replicas for pid in replica.pids)]), flush=True)
    if how == "finish":
        assert ray.data.range(64).map_batches(rows, num_cpus=0.1).count() == 64
    elif how == "raise":
        ray.data.range(64).map_batches(lambda table: 1 / 0, num_cpus=0.1).count()
    else:
        sent = [fake_engine.request("a", "steps 1"), fake_engine.request("b", "gate no")]
        outputs = PoolClient(pool.name).generate(sent)
        next(outputs)
        print("in the middle", flush=True)
        list(outputs)
print("closed", flush=True)
sys.stdin.read()
"""


def left(pool_name: str, pids: list[int], is_running: IsRunning) -> list[object]:
    """Returns what is there of a pool, by Ray's tables and by the process table."""
    groups = [
        (entry["name"], entry["state"])
        for entry in placement_group_table().values()
        if entry["name"].startswith(pool_name) and entry["state"] != "REMOVED"
    ]
    actors = [
        actor["ActorClassName"]
        for actor in all_actors().values()
        if actor["State"] != "DEAD" and actor["ActorClassName"] in ("Supervisor", "EngineReplica", "EngineWorker")
    ]
    return [*groups, *actors, *(pid for pid in pids if is_running(pid))]


def until_nothing_is_left(pool_name: str, pids: list[int], is_running: IsRunning) -> list[object]:
    calls = Retrying(
        retry=retry_if_result(bool),
        wait=wait_fixed(0.1),
        stop=stop_after_delay(LIMIT_S),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    remaining: list[object] = calls(left, pool_name, pids, is_running)
    return remaining


def interrupt(process: subprocess.Popen[str]) -> None:
    """Presses Ctrl-C, and again if nothing happens: an interrupt inside Ray's destructor of a stream is dropped."""
    for _ in range(3):
        os.kill(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


@pytest.fixture
def driver(cluster: None, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(how: str) -> subprocess.Popen[str]:
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-P", "-c", DRIVER, str(Path(__file__).parent), address, how]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["finish", "raise", "kill driver", "interrupt driver", "kill supervisor"])
def test_nothing_is_left(driver: Callable[[str], subprocess.Popen[str]], is_running: IsRunning, how: str) -> None:
    process = driver(how)
    assert process.stdout is not None
    name, *pids = json.loads(process.stdout.readline())
    assert len(left(name, pids, is_running)) >= (12 if how in ("kill driver", "interrupt driver") else 0)
    if how not in ("finish", "raise"):
        assert process.stdout.readline() == "in the middle\n"
    match how:
        case "kill driver":
            os.kill(process.pid, signal.SIGKILL)
        case "interrupt driver":
            interrupt(process)
        case "kill supervisor":  # The driver lives on and holds nothing.
            os.kill(pids[0], signal.SIGKILL)
    if how == "raise":
        process.wait(60)
    if how == "finish":  # The driver lives on and has closed the pool.
        assert process.stdout.readline() == "closed\n"
    assert until_nothing_is_left(name, pids, is_running) == []
