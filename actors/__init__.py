"""Where engines live: actors that each host one engine, a pool that keeps them alive, a client that routes to them.

It makes all of Ray's remote calls and knows nothing of datasets. The face is lazy (PEP 562): importing it loads neither
Ray nor torch; the first name that is used loads Ray, and torch is loaded only inside a replica.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_face

if TYPE_CHECKING:
    from .client import PoolClient
    from .config import PoolConfig
    from .nodes import accelerator_of, check_leaves_one_cpu
    from .placement import Placement
    from .pool import EnginePool
    from .replica import EngineReplica
    from .stats import PoolStats, ReplicaStats

__all__ = [
    "EnginePool",
    "EngineReplica",
    "Placement",
    "PoolClient",
    "PoolConfig",
    "PoolStats",
    "ReplicaStats",
    "accelerator_of",
    "check_leaves_one_cpu",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "EnginePool": "pool",
        "EngineReplica": "replica",
        "Placement": "placement",
        "PoolClient": "client",
        "PoolConfig": "config",
        "PoolStats": "stats",
        "ReplicaStats": "stats",
        "accelerator_of": "nodes",
        "check_leaves_one_cpu": "nodes",
    },
)
