"""Whether the replicas of a pool leave a whole CPU free, and how many ranks share a node."""

from __future__ import annotations

import math

from ...engine.errors import ConfigError
from ..config import PoolConfig
from .nodes import UNITS, Resources, cluster_nodes, fits, units


def ranks_per_node(config: PoolConfig, nodes: list[Resources] | None = None) -> int:
    """Returns the most ranks on a node if the ranks of all replicas are spread evenly over the nodes that can hold one.

    Args:
        config: Settings of the pool.
        nodes: Resources of each node; None for the nodes of the cluster that this process is connected to.
    """
    nodes = cluster_nodes() if nodes is None else nodes
    bundles = config.placement.bundles
    num_hosts = sum(any(fits(bundle, node) for bundle in bundles) for node in nodes)
    return math.ceil(config.max_replicas * len(bundles) / max(1, num_hosts))


def check_leaves_one_cpu(config: PoolConfig, other_cpus: float = 0.0, nodes: list[Resources] | None = None) -> None:
    """Checks that Ray Data's read tasks can run beside the replicas, on whichever nodes Ray places the replicas.

    A read task takes a whole CPU of one node, and replicas keep their CPUs while the job runs. A job that leaves less
    than a whole CPU on every node therefore waits forever.

    Args:
        config: Settings of the pool.
        other_cpus: CPUs that other parts of the job hold while it runs, such as the actors of its other stages.
        nodes: Resources of each node; None for the nodes of the cluster that this process is connected to.

    Raises:
        ConfigError: It is not certain that any node keeps a whole CPU free.
    """
    nodes = cluster_nodes() if nodes is None else nodes
    bundles = config.placement.bundles
    rank_cpus, num_ranks = max(bundle.get("CPU", 0.0) for bundle in bundles), config.max_replicas * len(bundles)
    rank, others = units(rank_cpus), units(other_cpus)
    num_to_fill = 0
    for node in nodes:
        spare = units(node.get("CPU", 0.0)) - others - UNITS
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
