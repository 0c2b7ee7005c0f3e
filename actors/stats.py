"""`PoolStats`, the state of a pool and its replicas as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ReplicaState = Literal["starting", "ready", "quarantine", "draining", "dead", "unplaced", "failed"]
PoolState = Literal["starting", "ready", "failed", "closed"]


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """The state of one replica of a pool.

    Attributes:
        replica_id: ``"INDEX.RESTART"``: a restarted replica is another one.
        state: ``"starting"``, ``"ready"``, ``"quarantine"`` (up, for requests that were on board at a death),
            ``"draining"`` (about to leave), ``"dead"`` (about to be restarted), ``"unplaced"`` (without room in the
            cluster, to be tried again) or ``"failed"`` (given up).
        num_restarts: Restarts after the replica had been ready.
        pids: Process ids of its ranks, rank 0 first; empty unless it is up.
        node_ids: Ray node of each rank; empty unless it is up.
        metrics: Its metrics, by their names in `actors/replica/metrics.py`; empty unless it is up and they were asked
            for.
        engine: Counters of its engine; None unless it is up and they were asked for.
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
    """The state of a pool and its replicas.

    Attributes:
        name: Name of the pool.
        state: ``"ready"`` if any replica is up, ``"starting"`` if one may come, ``"failed"`` if all were given up or
            have no room, ``"closed"``.
        reason: One line that says why a replica was given up or has no room; None if that did not happen.
        pid: Process id of the supervisor.
        replicas: One entry for each replica that the pool has or wants.
    """

    name: str
    state: PoolState
    reason: str | None
    pid: int
    replicas: list[ReplicaStats]
