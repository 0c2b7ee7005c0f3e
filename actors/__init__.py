"""Where engines live: actors that each host one engine, a pool that keeps them alive, a client that routes to them.

It makes all of Ray's remote calls and knows nothing of datasets. The face is lazy (PEP 562): importing it loads neither
Ray nor torch; the first name that is used loads Ray, and torch is loaded only inside a replica.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import PoolClient
    from .config import PoolConfig
    from .placement import check_leaves_one_cpu
    from .pool import EnginePool
    from .replica import EngineReplica
    from .stats import PoolStats, ReplicaStats

__all__ = [
    "EnginePool",
    "EngineReplica",
    "PoolClient",
    "PoolConfig",
    "PoolStats",
    "ReplicaStats",
    "check_leaves_one_cpu",
]

_HOME = {
    "EnginePool": "pool",
    "EngineReplica": "replica",
    "PoolClient": "client",
    "PoolConfig": "config",
    "PoolStats": "stats",
    "ReplicaStats": "stats",
    "check_leaves_one_cpu": "placement",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
