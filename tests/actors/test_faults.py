"""A job of 2,000 rows on three replicas, and something killed at a random moment: every row is there, exactly once."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import request
from node_cluster import Nodes

from millrace.actors import EnginePool, PoolClient
from millrace.actors.stats import ReplicaStats
from millrace.engine.outputs import RequestOutput

pytestmark = pytest.mark.slow

Pools = Callable[..., EnginePool]
Eventually = Callable[[Callable[[], object]], None]
NUM_ROWS, ROWS_PER_CALL, NUM_CALLERS = 2000, 100, 5
SEEDS = range(5)


class Job:
    """Runs the rows from several threads, and does something once when a given number of outputs has come."""

    def __init__(self, pool: EnginePool, seed: int, act: Callable[[ReplicaStats], None]) -> None:
        self._pool, self._act = pool, act
        self._random = random.Random(seed)
        self._moment = self._random.randrange(50, NUM_ROWS - 500)
        self._num_outputs = 0
        self._lock = threading.Lock()
        self._client = PoolClient(pool.name)

    def run(self) -> list[RequestOutput]:
        rows = [request(str(index), f"steps {self._random.randrange(1, 16)}") for index in range(NUM_ROWS)]
        calls = [rows[start : start + ROWS_PER_CALL] for start in range(0, NUM_ROWS, ROWS_PER_CALL)]
        with ThreadPoolExecutor(NUM_CALLERS) as threads:
            return [output for outputs in threads.map(self._call, calls) for output in outputs]

    def _call(self, rows: list) -> list[RequestOutput]:
        outputs = []
        for output in self._client.generate(rows):
            outputs.append(output)
            with self._lock:
                self._num_outputs += 1
                is_time = self._num_outputs == self._moment
            if is_time:
                up = [replica for replica in self._pool.stats().replicas if replica.pids]
                self._act(self._random.choice(up))
        return outputs


def check(pool: EnginePool, seed: int, act: Callable[[ReplicaStats], None]) -> None:
    print(f"seed {seed}")
    outputs = Job(pool, seed, act).run()
    assert sorted(int(output.request_id) for output in outputs) == list(range(NUM_ROWS)), f"seed {seed}"
    assert not [output.error for output in outputs if output.error], f"seed {seed}"


def test_a_replica_is_killed(start_pool: Pools, eventually: Eventually) -> None:
    pool = start_pool(num_replicas=3)
    for seed in SEEDS:
        pool.wait_ready()
        check(pool, seed, lambda replica: os.kill(replica.pids[0], signal.SIGKILL))
    # A replica that is killed after its last output is missed only later.
    eventually(lambda: sum(replica.num_restarts for replica in pool.stats().replicas) == len(SEEDS))


def test_another_rank_is_killed(start_pool: Pools, eventually: Eventually) -> None:
    pool = start_pool(num_replicas=3, engine_kwargs={"tensor_parallel_size": 2})
    for seed in SEEDS:
        pool.wait_ready()
        check(pool, seed, lambda replica: os.kill(replica.pids[1], signal.SIGKILL))
    # A replica that is killed after its last output is missed only later.
    eventually(lambda: sum(replica.num_restarts for replica in pool.stats().replicas) == len(SEEDS))


@pytest.mark.soak
def test_a_node_is_killed(cluster_of_three: Nodes, pools: Pools) -> None:
    pool = pools(num_replicas=3, placement_group_config={"bundle_per_worker": {"mill": 1}}, placement_timeout_s=120)
    for seed in SEEDS:
        cluster_of_three.restore()
        pool.wait_ready()
        check(pool, seed, lambda replica: cluster_of_three.remove(str(replica.node_id)))
