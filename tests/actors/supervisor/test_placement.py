"""Whether a pool fits a cluster, told without one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.actors import PoolConfig
from millrace.actors.replica.ranks import share_of_cores
from millrace.actors.supervisor.headroom import check_leaves_one_cpu, ranks_per_node
from millrace.actors.supervisor.placement import Placement
from millrace.engine.errors import ConfigError


def config(**settings: object) -> PoolConfig:
    return PoolConfig(engine_kwargs={"model": "m"}, **settings)


def bundles(**settings: object) -> list[dict[str, float]]:
    return list(config(**settings).placement.bundles)


def test_replica_asks_for_what_was_set() -> None:
    assert bundles(num_cpus_per_replica=0) == [{}]
    assert bundles(num_cpus_per_replica=0.5, num_gpus_per_replica=1, accelerator_type="H100") == [
        {"CPU": 0.5, "GPU": 1, "accelerator_type:H100": 0.001}
    ]


def test_ranks_share_evenly_what_was_set_for_the_replica() -> None:
    kwargs = {"model": "m", "tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    pool = PoolConfig(engine_kwargs=kwargs, num_cpus_per_replica=2, num_gpus_per_replica=4)
    assert pool.num_ranks == 4
    assert pool.placement.bundles == ({"CPU": 0.5, "GPU": 1},) * 4
    assert pool.placement.total == {"CPU": 2, "GPU": 4}


def test_bundles_can_be_given_as_in_ray_data_llm() -> None:
    tp2 = {"model": "m", "tensor_parallel_size": 2}
    same = PoolConfig(engine_kwargs=tp2, placement_group_config={"bundle_per_worker": {"CPU": 2, "mill": 1, "GPU": 0}})
    assert same.placement == Placement(({"CPU": 2, "mill": 1},) * 2)
    each = {"bundles": [{"GPU": 1}, {"CPU": 1}], "strategy": "SPREAD"}
    given = PoolConfig(engine_kwargs=tp2, placement_group_config=each, accelerator_type="L4")
    kind = {"accelerator_type:L4": 0.001}
    assert given.placement == Placement(({"GPU": 1, **kind}, {"CPU": 1, **kind}), "SPREAD")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bundle": {}}, "no field 'bundle'; did you mean 'bundles'"),
        ({}, "one of bundle_per_worker"),
        ({"bundles": [{"CPU": 1}], "bundle_per_worker": {"CPU": 1}}, "one of bundle_per_worker"),
        ({"bundles": [{"CPU": 1}, {"CPU": 1}]}, "bundles must be a list of 1"),
        ({"bundles": {"CPU": 1}}, "bundles must be a list of 1"),
        ({"bundle_per_worker": {"CPU": -1}}, "'CPU' of a bundle must be a number of at least 0; got -1"),
        ({"bundle_per_worker": 1}, "a bundle must be a dict"),
        ({"bundle_per_worker": {"CPU": 1}, "strategy": "TIGHT"}, "strategy must be one of PACK, STRICT_PACK"),
    ],
)
def test_wrong_placement_group_config_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(placement_group_config=given)


def test_ranks_stay_on_one_node_where_one_is_large_enough() -> None:
    placement = Placement(({"GPU": 1.0},) * 4)
    assert placement.resolved_strategy([{"GPU": 2.0}, {"GPU": 4.0}]) == "STRICT_PACK"
    assert placement.resolved_strategy([{"GPU": 2.0}, {"GPU": 2.0}]) == "PACK"
    assert Placement(({"GPU": 1.0},), "SPREAD").resolved_strategy([{"GPU": 2.0}]) == "SPREAD"


def test_ranks_that_share_a_node_are_counted() -> None:
    assert ranks_per_node(config(num_replicas=3), [{"CPU": 4.0}, {"CPU": 1.0}]) == 2
    assert ranks_per_node(config(num_replicas=(1, 4)), [{"CPU": 4.0}]) == 4
    assert ranks_per_node(config(num_cpus_per_replica=0.1, num_replicas=10), [{"CPU": 1.0}]) == 10
    accelerated = config(accelerator_type="H100", num_replicas=2)
    assert ranks_per_node(accelerated, [{"CPU": 4.0}, {"CPU": 4.0, "accelerator_type:H100": 1.0}]) == 2


@pytest.mark.parametrize(
    ("cpus", "num_replicas", "per_replica", "others", "leaves"),
    [
        ([2.0], 1, 1, 0.1, False),  # the trap: 1 + 0.1 of 2 leaves no whole CPU
        ([2.0], 1, 0.9, 0.1, True),
        ([2.0], 1, 1, 0, True),
        ([2.0], 3, 0.3, 0.1, True),
        ([1.0], 1, 0, 0, True),
        ([1.0], 1, 0, 0.1, False),
        ([0.0], 1, 0, 0, False),
        ([1.0, 1.0], 2, 0.5, 0, False),  # one on each node
        ([1.0, 1.0], 1, 0.5, 0, True),
        ([8.0, 8.0], 14, 1, 0, True),
    ],
)
def test_a_whole_cpu_is_left(
    cpus: list[float], num_replicas: int, per_replica: float, others: float, leaves: bool
) -> None:
    pool = config(num_replicas=num_replicas, num_cpus_per_replica=per_replica)
    nodes = [{"CPU": count} for count in cpus]
    if leaves:
        check_leaves_one_cpu(pool, others, nodes)
    else:
        with pytest.raises(ConfigError, match="Lower num_cpus_per_replica"):
            check_leaves_one_cpu(pool, others, nodes)


@given(
    cpus=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    num_replicas=st.integers(1, 5),
    tenths=st.integers(1, 25),
)
def test_passes_exactly_if_every_placement_leaves_a_cpu(cpus: list[int], num_replicas: int, tenths: int) -> None:
    fitting = [count * 10 // tenths for count in cpus]
    placements = itertools.product(*(range(count + 1) for count in fitting))
    full = [placed for placed in placements if sum(placed) == num_replicas]
    is_safe = all(any(10 * c - n * tenths >= 10 for c, n in zip(cpus, p, strict=True)) for p in full)
    if not full:
        return  # there is no room at all
    pool = config(num_replicas=num_replicas, num_cpus_per_replica=tenths / 10)
    nodes = [{"CPU": float(count)} for count in cpus]
    if is_safe:
        check_leaves_one_cpu(pool, 0.0, nodes)
    else:
        with pytest.raises(ConfigError):
            check_leaves_one_cpu(pool, 0.0, nodes)


@pytest.mark.parametrize(
    ("cpus", "num_replicas", "per_node"),
    [([2.0], 1, 1), ([2.0], 3, 3), ([8.0, 8.0], 2, 1), ([8.0, 8.0], 3, 2), ([8.0, 0.5], 4, 4), ([0.0], 1, 1)],
)
def test_replicas_are_spread_over_the_nodes_that_can_hold_one(
    cpus: list[float], num_replicas: int, per_node: int
) -> None:
    pool = config(num_replicas=num_replicas, num_cpus_per_replica=1)
    assert ranks_per_node(pool, [{"CPU": count} for count in cpus]) == per_node


@given(num_cores=st.integers(1, 256), num_cpus=st.integers(0, 256), num_sharing=st.integers(1, 20))
def test_engines_of_a_node_have_a_thread_each_and_no_more_threads_than_cores(
    num_cores: int, num_cpus: int, num_sharing: int
) -> None:
    share = share_of_cores(num_cores, float(num_cpus), num_sharing)
    assert share >= 1
    assert share == 1 or share * num_sharing <= min(num_cores, num_cpus) < (share + 1) * num_sharing


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_replicas", 0),
        ("num_replicas", 1.5),
        ("num_replicas", True),
        ("num_replicas", (2, 1)),
        ("num_replicas", (0, 1)),
        ("num_replicas", (1, 2, 3)),
        ("max_attempts", 0),
        ("max_deaths_in_a_row", 0),
        ("requests_per_replica", 0),
        ("placement_timeout_s", 0),
        ("step_timeout_s", -1),
        ("scale_down_delay_s", "1"),
        ("max_start_failures", 0),
        ("num_cpus_per_replica", -1),
        ("num_cpus_per_replica", float("nan")),
        ("num_gpus_per_replica", "1"),
        ("start_backoff_s", -0.1),
    ],
)
def test_wrong_setting_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be .*; got "):
        config(**{name: value})
