"""Where engines live: actors that each host one engine, a pool that keeps them alive, a client that routes to them.

It makes all of Ray's remote calls and knows nothing of datasets. The face is lazy (PEP 562): importing it loads neither
Ray nor torch; the first name that is used loads Ray, and torch is loaded only inside a replica.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_face

if TYPE_CHECKING:
    from .client.client import PoolClient as PoolClient
    from .config import PoolConfig as PoolConfig
    from .replica.replica import EngineReplica as EngineReplica
    from .stats import PoolStats as PoolStats
    from .stats import ReplicaStats as ReplicaStats
    from .supervisor.headroom import check_leaves_one_cpu as check_leaves_one_cpu
    from .supervisor.nodes import accelerator_of as accelerator_of
    from .supervisor.placement import Placement as Placement
    from .supervisor.pool import EnginePool as EnginePool

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "client.client": ("PoolClient",),
        "config": ("PoolConfig",),
        "replica.replica": ("EngineReplica",),
        "stats": ("PoolStats", "ReplicaStats"),
        "supervisor.headroom": ("check_leaves_one_cpu",),
        "supervisor.nodes": ("accelerator_of",),
        "supervisor.placement": ("Placement",),
        "supervisor.pool": ("EnginePool",),
    },
)
