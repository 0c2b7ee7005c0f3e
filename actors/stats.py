"""What a pool tells about itself: plain data, no handle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ReplicaState = Literal["starting", "ready", "quarantine", "draining", "dead", "unplaced", "failed"]
PoolState = Literal["starting", "ready", "failed", "closed"]


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """One replica of a pool.

    Attributes:
        replica_id: ``"INDEX.RESTART"``: a restarted replica is another one.
        state: ``"starting"``, ``"ready"``, ``"quarantine"`` (up, and kept for requests that were there at a death),
            ``"draining"`` (about to leave), ``"dead"`` (about to start again), ``"unplaced"`` (no room in the cluster,
            to be tried again) or ``"failed"`` (given up).
        num_restarts: Times it was started again after it had been ready.
        pids: Its processes, rank 0 first; empty unless it is up.
        node_ids: The Ray node of each; empty unless it is up.
        metrics: Its figures, as named in the table of `actors/replica/metrics.py`; empty unless it is up and they were
            asked for.
        engine: Counters of its engine as they are; None unless it is up and they were asked for.
    """

    replica_id: str
    state: ReplicaState
    num_restarts: int
    pids: tuple[int, ...] = ()
    node_ids: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    engine: Any = None

    @property
    def pid(self) -> int | None:
        """The process of rank 0; None unless it is up."""
        return self.pids[0] if self.pids else None

    @property
    def node_id(self) -> str | None:
        """The Ray node of rank 0; None unless it is up."""
        return self.node_ids[0] if self.node_ids else None


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool and its replicas.

    Attributes:
        name: Name of the pool.
        state: ``"ready"`` if any replica is up, ``"starting"`` if one may come, ``"failed"`` if all were given up or
            have no room, ``"closed"``.
        reason: Why a replica was given up or has no room, in one line; None if none was.
        pid: Process of the supervisor.
        replicas: One entry for each replica the pool has or wants.
    """

    name: str
    state: PoolState
    reason: str | None
    pid: int
    replicas: list[ReplicaStats]
