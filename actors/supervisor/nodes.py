"""The nodes of the cluster: what they have, which are about to go, and whether a pool leaves room beside it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import ray

# Ray tells of nodes that are being drained in no public way yet; Ray Serve and Ray Train read this as well.
from ray._private.state import state as ray_state

from ...engine.errors import ConfigError

if TYPE_CHECKING:
    from ..config import PoolConfig

Resources = dict[str, float]

_UNITS = 10_000
"""Ray counts resources in ten-thousandths; whole numbers keep 3 x 0.1 from being more than 0.3."""

KIND = "accelerator_type:"
"""How Ray's name of the resource that stands for a kind of accelerator begins."""

_BOOKKEEPING = ("node:", "memory", "object_store_memory", "bundle_group_")
"""Beginnings of the names of resources that nobody asks for by hand."""


def cluster_nodes() -> list[Resources]:
    """Returns all resources of each living node of the cluster, free or not."""
    nodes: list[dict[str, Any]] = ray.nodes()
    return [node["Resources"] for node in nodes if node["Alive"]]


def is_alive(node_id: str) -> bool:
    """Returns whether a node, named in hexadecimal, is up."""
    return any(node["Alive"] and node["NodeID"] == node_id for node in ray.nodes())


def accelerator_of(node_id: str) -> str | None:
    """Returns the kind of accelerator of a node, named in hexadecimal; None if it has none, or is gone."""
    names = [name for node in ray.nodes() if node["NodeID"] == node_id for name in node["Resources"]]
    return next((name.removeprefix(KIND) for name in names if name.startswith(KIND)), None)


def draining_nodes() -> dict[str, float | None]:
    """Returns the nodes that are about to go, because of a preemption or a smaller cluster.

    Returns:
        Node id in hexadecimal -> seconds it has left; None where nobody said when it goes.
    """
    now_s = time.time()
    deadlines: dict[str, int] = ray_state.get_draining_nodes()
    return {node_id: max(0.0, ms / 1000 - now_s) if ms else None for node_id, ms in deadlines.items()}


def fits(asked: Resources, node: Resources) -> bool:
    """Returns whether a node could hold what is asked for if nothing else ran on it."""
    return bool(_num_fitting(asked, node, 1))


def ranks_per_node(config: PoolConfig, nodes: list[Resources] | None = None) -> int:
    """Returns how many ranks share a node at most when they are spread over all nodes that can hold one.

    Args:
        config: Settings of the pool.
        nodes: Resources of each node; None for those of the cluster this process is connected to.
    """
    nodes = cluster_nodes() if nodes is None else nodes
    bundles = config.placement.bundles
    num_hosts = sum(any(fits(bundle, node) for bundle in bundles) for node in nodes)
    return math.ceil(config.max_replicas * len(bundles) / max(1, num_hosts))


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
    bundles = config.placement.bundles
    rank_cpus, num_ranks = max(bundle.get("CPU", 0.0) for bundle in bundles), config.max_replicas * len(bundles)
    rank, others = _units(rank_cpus), _units(other_cpus)
    num_to_fill = 0
    for node in nodes:
        spare = _units(node.get("CPU", 0.0)) - others - _UNITS
        if spare >= 0 and not rank:
            return
        num_to_fill += spare // rank + 1 if spare >= 0 else 0
    if num_to_fill > num_ranks:
        return
    total = sum(node.get("CPU", 0.0) for node in nodes)
    raise ConfigError(
        f"{config.max_replicas} replica(s) of {config.placement.total.get('CPU', 0.0):g} CPU and {other_cpus:g} CPU "
        f"for the other stages may leave no whole CPU free on any of {len(nodes)} node(s) with {total:g} CPU in all; "
        "reading the dataset needs one, so the job would wait forever. Lower num_cpus_per_replica (it may be a "
        "fraction, or 0) or num_replicas, or give Ray more CPUs"
    )


def describe(resources: Resources) -> str:
    """Writes resources for people: what can be asked for, not Ray's own bookkeeping."""
    shown = sorted(name for name in resources if not name.startswith(_BOOKKEEPING) and "_group_" not in name)
    return "{" + ", ".join(f"{name}: {resources[name]:g}" for name in shown) + "}"


def _num_fitting(asked: Resources, node: Resources, limit: int) -> int:
    """Returns how many times a request fits on an empty node, at most `limit`."""
    counts = [_units(node.get(name, 0.0)) // _units(amount) for name, amount in asked.items() if _units(amount)]
    return min([limit, *counts])


def _units(amount: float) -> int:
    return round(amount * _UNITS)
