"""Replicas over several nodes: where they stand, and what becomes of them when a node goes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_engine import requests
from node_cluster import Nodes
from ray.util import placement_group_table

from millrace.actors import EnginePool, PoolClient
from millrace.engine.errors import EngineDeadError, PlacementError
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

Pools = Callable[..., EnginePool]
Eventually = Callable[[Callable[[], object]], None]
ONE_MILL = {"bundle_per_worker": {"mill": 1}}


def groups(pool: EnginePool) -> dict[str, dict]:
    table = placement_group_table().values()
    return {
        entry["name"]: entry
        for entry in table
        if entry["name"].startswith(pool.name) and entry["state"] not in ("REMOVED",)
    }


def test_rank_i_is_in_bundle_i_and_ranks_spread_only_where_they_must(cluster_of_three: Nodes, pools: Pools) -> None:
    pool = pools(engine_kwargs={"tensor_parallel_size": 2}, placement_group_config=ONE_MILL)
    pool.wait_ready()
    (replica,) = pool.stats().replicas
    (group,) = groups(pool).values()
    assert group["strategy"] == "PACK"
    assert replica.node_ids == tuple(group["bundles_to_node_id"][index] for index in range(2))
    assert len(set(replica.node_ids)) == len(set(replica.pids)) == 2
    packed = pools(engine_kwargs={"pipeline_parallel_size": 2})
    packed.wait_ready()
    assert len(set(packed.stats().replicas[0].node_ids)) == 1
    assert [group["strategy"] for group in groups(packed).values()] == ["STRICT_PACK"]


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_a_model_over_two_nodes_says_what_it_says_on_one(
    cluster_of_three: Nodes, pools: Pools, tiny_model: Callable[[str], Path], sizes: dict[str, int]
) -> None:
    from millrace.actors.replica.ranks import build_engine, run_rank
    from millrace.engine.llm import LLM

    kwargs = {"model": str(tiny_model("llama")), "dtype": "float32", "max_num_seqs": 4, "num_threads": 1}
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompts = [[3 + index, 40, 7 * index + 5] for index in range(6)]
    pool = pools(
        engine_kwargs={**kwargs, **sizes},
        placement_group_config=ONE_MILL,
        engine_factory=build_engine,
        rank_main=run_rank,
    )
    sent = [GenerateRequest(str(index), None, prompt, params) for index, prompt in enumerate(prompts)]
    outputs = {output.request_id: output for output in PoolClient(pool.name).generate(sent)}
    assert len(set(pool.stats().replicas[0].node_ids)) == 2
    with LLM(**kwargs) as llm:
        alone = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    ours = [outputs[str(index)].outputs[0].token_ids for index in range(6)]
    assert ours == [output.outputs[0].token_ids for output in alone]


def test_no_room_says_in_time_what_was_asked_for_and_what_there_is(cluster_of_three: Nodes, pools: Pools) -> None:
    pool = pools(placement_group_config={"bundle_per_worker": {"mill": 2}}, placement_timeout_s=0.5)
    with pytest.raises(PlacementError, match=r"within 0\.5 s: it asks for \{mill: 2\}; .*\{CPU: 1, mill: 1\}.*is free"):
        pool.wait_ready(timeout_s=60)
    assert groups(pool) == {}
    with pytest.raises(EngineDeadError, match="PlacementError: no room for replica"):
        list(PoolClient(pool.name).generate(requests("steps 1", 1)))


def test_room_that_others_hold_is_waited_for(cluster_of_three: Nodes, pools: Pools) -> None:
    first = pools(num_replicas=3, placement_group_config=ONE_MILL)
    first.wait_ready()
    second = pools(placement_group_config=ONE_MILL, placement_timeout_s=50)
    first.close()
    second.wait_ready()
    assert second.stats().state == "ready"


def test_what_has_no_room_does_not_hold_up_what_has(cluster_of_three: Nodes, pools: Pools) -> None:
    pool = pools(num_replicas=4, placement_group_config=ONE_MILL, placement_timeout_s=0.5)
    pool.wait_ready(timeout_s=60)
    assert sorted(replica.state for replica in pool.stats().replicas) == ["ready", "ready", "ready", "unplaced"]
    assert len(list(PoolClient(pool.name).generate(requests("steps 1", 30)))) == 30


def test_a_node_that_is_told_to_go_finishes_what_it_has(
    cluster_of_three: Nodes, pools: Pools, gate: Path, eventually: Eventually
) -> None:
    pool = pools(num_replicas=2, placement_group_config=ONE_MILL)
    pool.wait_ready()
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(lambda: list(PoolClient(pool.name).generate(requests(f"gate {gate}", 10))))
        going = pool.stats(with_engines=True).replicas[0]
        eventually(lambda: pool.stats(with_engines=True).replicas[0].engine["num_running"] == 5)
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster_of_three.address]
        command += ["--node-id", str(going.node_id), "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", "300"]
        subprocess.run(command, check=True, capture_output=True)
        eventually(lambda: pool.stats().replicas[0].state == "draining")
        gate.touch()
        outputs = result.result()
    assert {output.metrics.attempt for output in outputs} == {1}
    assert len({output.request_id for output in outputs}) == 10
    eventually(lambda: pool.stats().replicas[0].state == "ready" and pool.stats().replicas[0].num_restarts == 1)
    assert pool.stats().replicas[0].node_id != going.node_id
    cluster_of_three.remove(str(going.node_id))


def test_a_pool_whose_nodes_all_go_ends_the_job_with_an_error(
    cluster_of_three: Nodes, pools: Pools, gate: Path, eventually: Eventually
) -> None:
    pool = pools(num_replicas=3, placement_group_config=ONE_MILL, placement_timeout_s=1)
    pool.wait_ready()
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(lambda: list(PoolClient(pool.name).generate(requests(f"gate {gate}", 30))))
        eventually(
            lambda: sum(r.engine["num_running"] for r in pool.stats(with_engines=True).replicas if r.engine) == 30
        )
        for replica in pool.stats().replicas:
            cluster_of_three.remove(str(replica.node_id))
        with pytest.raises(EngineDeadError, match="PlacementError: no room for replica"):
            result.result(timeout=120)
    assert os.path.exists(gate) is False
