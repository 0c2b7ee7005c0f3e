"""What a pool tells about itself: plain data, no handle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ReplicaState = Literal["starting", "ready", "dead", "failed"]
PoolState = Literal["starting", "ready", "failed", "closed"]


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """One replica of a pool.

    Attributes:
        replica_id: ``"INDEX.RESTART"``: a restarted replica is another one.
        state: ``"starting"``, ``"ready"``, ``"dead"`` (about to start again) or ``"failed"`` (given up).
        num_restarts: Times it died after it had been ready.
        pid: Its process; None unless it is ready.
        node_id: Its Ray node; None unless it is ready.
        engine: Counters of its engine; None unless it is ready and they were asked for.
    """

    replica_id: str
    state: ReplicaState
    num_restarts: int
    pid: int | None = None
    node_id: str | None = None
    engine: Any = None


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool and its replicas.

    Attributes:
        name: Name of the pool.
        state: ``"ready"`` if any replica is, ``"starting"`` if one may come, ``"failed"`` if all were given up,
            ``"closed"``.
        reason: Why a replica was given up, in one line; None if none was.
        pid: Process of the supervisor.
        replicas: One entry for each replica the pool was asked for.
    """

    name: str
    state: PoolState
    reason: str | None
    pid: int
    replicas: list[ReplicaStats]
