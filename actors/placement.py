"""Whether a cluster has room for a pool, told before anything waits for room that never comes."""

from __future__ import annotations

import math
from typing import Any

import ray

from ..engine.errors import ConfigError
from .config import PoolConfig

Resources = dict[str, float]

_UNITS = 10_000
"""Ray counts resources in ten-thousandths; whole numbers keep 3 x 0.1 from being more than 0.3."""


def replica_resources(config: PoolConfig) -> Resources:
    """Returns what Ray must set aside for one replica.

    Args:
        config: Settings of the pool.

    Returns:
        Resource name -> amount, without those of which it takes nothing.
    """
    asked = {"CPU": config.num_cpus_per_replica, "GPU": config.num_gpus_per_replica}
    if config.accelerator_type is not None:
        asked[f"accelerator_type:{config.accelerator_type}"] = 0.001
    return {name: amount for name, amount in asked.items() if amount}


def cluster_nodes() -> list[Resources]:
    """Returns all resources of each living node of the cluster, free or not."""
    nodes: list[dict[str, Any]] = ray.nodes()
    return [node["Resources"] for node in nodes if node["Alive"]]


def replicas_per_node(config: PoolConfig, nodes: list[Resources] | None = None) -> int:
    """Returns how many replicas share a node at most when they are spread over all nodes that can hold one.

    Args:
        config: Settings of the pool.
        nodes: Resources of each node; None for those of the cluster this process is connected to.
    """
    nodes = cluster_nodes() if nodes is None else nodes
    asked = replica_resources(config)
    num_hosts = sum(_num_fitting(asked, node, 1) for node in nodes)
    return math.ceil(config.num_replicas / max(1, num_hosts))


def check_placeable(config: PoolConfig, nodes: list[Resources] | None = None) -> None:
    """Checks that the cluster could hold all replicas if nothing else ran on it.

    Args:
        config: Settings of the pool.
        nodes: Resources of each node; None for those of the cluster this process is connected to.

    Raises:
        ConfigError: It never could.
    """
    nodes = cluster_nodes() if nodes is None else nodes
    asked = replica_resources(config)
    num_placeable = sum(_num_fitting(asked, node, config.num_replicas) for node in nodes)
    if num_placeable < config.num_replicas:
        raise ConfigError(
            f"{config.num_replicas} replica(s) of {_describe(asked)} each were asked for, and the cluster has room for "
            f"{num_placeable}: its nodes have {'; '.join(_describe(node) for node in nodes) or 'nothing'}. Lower "
            "num_replicas, num_cpus_per_replica or num_gpus_per_replica, or add nodes"
        )


def check_leaves_one_cpu(config: PoolConfig, other_cpus: float = 0.0, nodes: list[Resources] | None = None) -> None:
    """Checks that Ray Data's read tasks can run beside the replicas, wherever Ray puts those.

    A read task takes a whole CPU of one node. Replicas never give theirs back while the job runs, so a job that leaves
    less than that on every node waits forever.

    Args:
        config: Settings of the pool.
        other_cpus: CPUs that else is held while the job runs, such as by the actors of the job's other stages.
        nodes: Resources of each node; None for those of the cluster this process is connected to.

    Raises:
        ConfigError: No node is sure to keep a whole CPU free.
    """
    nodes = cluster_nodes() if nodes is None else nodes
    replica, others = _units(config.num_cpus_per_replica), _units(other_cpus)
    num_to_fill = 0
    for node in nodes:
        spare = _units(node.get("CPU", 0.0)) - others - _UNITS
        if spare >= 0 and not replica:
            return
        num_to_fill += spare // replica + 1 if spare >= 0 else 0
    if num_to_fill > config.num_replicas:
        return
    total = sum(node.get("CPU", 0.0) for node in nodes)
    raise ConfigError(
        f"{config.num_replicas} replica(s) of {config.num_cpus_per_replica:g} CPU and {other_cpus:g} CPU for the other "
        f"stages may leave no whole CPU free on any of {len(nodes)} node(s) with {total:g} CPU in all; reading the "
        "dataset needs one, so the job would wait forever. Lower num_cpus_per_replica (it may be a fraction, or 0) or "
        "num_replicas, or give Ray more CPUs"
    )


def _num_fitting(asked: Resources, node: Resources, limit: int) -> int:
    """Returns how many times a request fits on an empty node, at most `limit`."""
    fits = [_units(node.get(name, 0.0)) // _units(amount) for name, amount in asked.items()]
    return min([limit, *fits])


def _units(amount: float) -> int:
    return round(amount * _UNITS)


def _describe(resources: Resources) -> str:
    """Writes resources for people: CPU, GPU and accelerators, not Ray's own bookkeeping."""
    shown = sorted(name for name in resources if name in ("CPU", "GPU") or name.startswith("accelerator_type:"))
    return "{" + ", ".join(f"{name}: {resources[name]:g}" for name in shown) + "}"
