"""The nodes of the cluster: their resources, and which of them are about to go."""

from __future__ import annotations

import time
from typing import Any

import ray

# Ray has no public call that lists draining nodes yet; Ray Serve and Ray Train use this private one as well.
from ray._private.state import state as ray_state

Resources = dict[str, float]

UNITS = 10_000
"""Ray counts resources in ten-thousandths. Integers are exact, where 3 x 0.1 as floats is more than 0.3."""

KIND = "accelerator_type:"
"""Prefix of the resource with which Ray marks the accelerator type of a node."""

_BOOKKEEPING = ("node:", "memory", "object_store_memory", "bundle_group_")
"""Prefixes of the resources that Ray adds by itself, which error messages leave out."""


def cluster_nodes() -> list[Resources]:
    """Returns the total resources, free and used, of each living node of the cluster."""
    nodes: list[dict[str, Any]] = ray.nodes()
    return [node["Resources"] for node in nodes if node["Alive"]]


def is_alive(node_id: str) -> bool:
    """Returns whether a node is up, given its id in hexadecimal."""
    return any(node["Alive"] and node["NodeID"] == node_id for node in ray.nodes())


def accelerator_of(node_id: str) -> str | None:
    """Returns the accelerator type of a node, given its id in hexadecimal; None if it has none or is gone."""
    names = [name for node in ray.nodes() if node["NodeID"] == node_id for name in node["Resources"]]
    return next((name.removeprefix(KIND) for name in names if name.startswith(KIND)), None)


def draining_nodes() -> dict[str, float | None]:
    """Returns the nodes that will soon leave the cluster, after a preemption or because the cluster shrinks.

    Returns:
        Node id in hexadecimal -> seconds until the node leaves; None where the deadline is unknown.
    """
    now_s = time.time()
    deadlines: dict[str, int] = ray_state.get_draining_nodes()
    return {node_id: max(0.0, ms / 1000 - now_s) if ms else None for node_id, ms in deadlines.items()}


def fits(asked: Resources, node: Resources) -> bool:
    """Returns whether the resources `asked` fit on an empty node that has the resources `node` in all."""
    return bool(_num_fitting(asked, node, 1))


def describe(resources: Resources) -> str:
    """Returns resources as text for messages, ``{CPU: 4, GPU: 1}``, without the entries that Ray adds by itself."""
    shown = sorted(name for name in resources if not name.startswith(_BOOKKEEPING) and "_group_" not in name)
    return "{" + ", ".join(f"{name}: {resources[name]:g}" for name in shown) + "}"


def _num_fitting(asked: Resources, node: Resources, limit: int) -> int:
    """Returns how many times the resources `asked` fit on an empty node with the resources `node`, at most `limit`."""
    counts = [units(node.get(name, 0.0)) // units(amount) for name, amount in asked.items() if units(amount)]
    return min([limit, *counts])


def units(amount: float) -> int:
    """Returns an amount of a resource as an integer number of ten-thousandths, the unit in which Ray counts."""
    return round(amount * UNITS)
