"""Whether a pool fits a cluster, told without one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.actors import PoolConfig
from millrace.actors.placement import check_leaves_one_cpu, check_placeable, replica_resources, replicas_per_node
from millrace.actors.replica import share_of_cores
from millrace.engine.errors import ConfigError


def config(**settings: object) -> PoolConfig:
    return PoolConfig(engine_kwargs={"model": "m"}, **settings)


def test_replica_asks_for_what_was_set() -> None:
    assert replica_resources(config(num_cpus_per_replica=0)) == {}
    assert replica_resources(config(num_cpus_per_replica=0.5, num_gpus_per_replica=1, accelerator_type="H100")) == {
        "CPU": 0.5,
        "GPU": 1,
        "accelerator_type:H100": 0.001,
    }


def test_replica_that_fits_no_node_is_refused_though_the_sum_would_do() -> None:
    nodes = [{"CPU": 2.0, "memory": 1e9}, {"CPU": 2.0}]
    check_placeable(config(num_replicas=2, num_cpus_per_replica=2), nodes)
    with pytest.raises(ConfigError, match=r"1 replica\(s\) of \{CPU: 4\}.*room for 0.*\{CPU: 2\}; \{CPU: 2\}"):
        check_placeable(config(num_cpus_per_replica=4), nodes)


def test_shares_that_sum_up_to_a_whole_fit() -> None:
    check_placeable(config(num_replicas=10, num_cpus_per_replica=0.1), [{"CPU": 1.0}])
    with pytest.raises(ConfigError, match="room for 10"):
        check_placeable(config(num_replicas=11, num_cpus_per_replica=0.1), [{"CPU": 1.0}])


def test_accelerator_that_no_node_has_is_refused() -> None:
    nodes = [{"CPU": 8.0, "GPU": 8.0, "accelerator_type:A100": 1.0}]
    check_placeable(config(num_gpus_per_replica=1, accelerator_type="A100"), nodes)
    with pytest.raises(ConfigError, match=r"accelerator_type:H100.*GPU: 8, accelerator_type:A100: 1"):
        check_placeable(config(num_gpus_per_replica=1, accelerator_type="H100"), nodes)


def test_replica_that_takes_nothing_always_fits() -> None:
    check_placeable(config(num_replicas=100, num_cpus_per_replica=0), [{"CPU": 1.0}])


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
        return  # check_placeable refuses it
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
    assert replicas_per_node(pool, [{"CPU": count} for count in cpus]) == per_node


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
        ("max_attempts", 0),
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
