"""The nodes of the cluster: their resources, and which of them are about to go."""

from __future__ import annotations

import time
from typing import Any

import ray

# Ray tells of nodes that are being drained in no public way yet; Ray Serve and Ray Train read this as well.
from ray._private.state import state as ray_state

Resources = dict[str, float]

UNITS = 10_000
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


def describe(resources: Resources) -> str:
    """Writes resources for people: what can be asked for, not Ray's own bookkeeping."""
    shown = sorted(name for name in resources if not name.startswith(_BOOKKEEPING) and "_group_" not in name)
    return "{" + ", ".join(f"{name}: {resources[name]:g}" for name in shown) + "}"


def _num_fitting(asked: Resources, node: Resources, limit: int) -> int:
    """Returns how many times a request fits on an empty node, at most `limit`."""
    counts = [units(node.get(name, 0.0)) // units(amount) for name, amount in asked.items() if units(amount)]
    return min([limit, *counts])


def units(amount: float) -> int:
    """Returns an amount of a resource in Ray's units of a ten-thousandth."""
    return round(amount * UNITS)
