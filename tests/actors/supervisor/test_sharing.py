"""One pool for several users, and prompts' beginnings that stay together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, requests

from checkpoints import tiny_checkpoint
from millrace.actors import EnginePool, PoolClient, PoolConfig
from millrace.engine.errors import EngineDeadError
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams

Pools = Callable[..., EnginePool]


def share(engine: str, **settings: Any) -> EnginePool:
    common = {"num_cpus_per_replica": 0, "engine_factory": FakeEngine}
    return EnginePool.share(PoolConfig(engine_kwargs={"model": engine}, **common, **settings))


def test_users_of_one_engine_share_its_replicas_until_the_last_one_closes(cluster: None) -> None:
    with share("a") as first, share("b") as other:
        with share("a", num_replicas=2) as second:
            assert first.name == second.name != other.name
            second.wait_ready()
            assert len(first.stats().replicas) == 2
            client = PoolClient(first.name)
        assert len(list(client.generate(requests("steps 1", 8)))) == 8
    with pytest.raises(EngineDeadError, match="there is no pool"):
        PoolClient(first.name)


def test_a_pool_that_was_shared_can_be_started_again(cluster: None) -> None:
    names = []
    for _ in range(3):
        with share("again") as pool:
            pool.wait_ready()
            names.append(pool.name)
            assert [replica.num_restarts for replica in pool.stats().replicas] == [0]
    assert len(set(names)) == 1


NUM_PREFIXES, ROWS_EACH, PREFIX_TOKENS = 20, 6, 512


def num_cached(pools: Pools, model: Path, num_replicas: int) -> int:
    """Runs rows of 20 beginnings, one after the other in turn, and returns how many prompt tokens were in the cache."""
    from millrace.actors.replica.ranks import build_engine

    # Room for all beginnings at once: what is looked for is not lost for want of it.
    kwargs = {"model": str(model), "dtype": "float32", "max_num_seqs": 8, "num_threads": 1}
    kwargs["num_gpu_blocks_override"] = 1200
    pool = pools(engine_kwargs=kwargs, engine_factory=build_engine, num_replicas=num_replicas)
    pool.wait_ready()
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    rows = [
        GenerateRequest(f"{prefix}-{row}", None, [3 + prefix] * PREFIX_TOKENS + [100 + row] * 4, params)
        for row in range(ROWS_EACH)
        for prefix in range(NUM_PREFIXES)
    ]
    client = PoolClient(pool.name)
    outputs = [output for start in range(0, len(rows), 40) for output in client.generate(rows[start : start + 40])]
    assert len(outputs) == len(rows)
    assert not [output.error for output in outputs if output.error]
    assert len({output.metrics.replica_id for output in outputs}) == num_replicas
    pool.close()
    return sum(output.num_cached_tokens or 0 for output in outputs)


@pytest.mark.soak
@pytest.mark.slow
def test_three_replicas_find_as_much_in_their_caches_as_one(cluster: None, pools: Pools, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, "llama", max_position_embeddings=600)
    one, three = num_cached(pools, model, 1), num_cached(pools, model, 3)
    print(f"cached prompt tokens: {one} on one replica, {three} on three: {three / one:.3f}")
    assert one > 0.7 * NUM_PREFIXES * ROWS_EACH * PREFIX_TOKENS
    assert three >= 0.9 * one
