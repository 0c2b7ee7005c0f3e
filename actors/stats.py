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
        replica_id: ``"INDEX.RESTART"``: number of the member and of its restart, so a restarted replica has another id.
        state: ``"starting"``, ``"ready"``, ``"quarantine"`` (up, for requests that were on board at a death),
            ``"draining"`` (about to leave), ``"dead"`` (about to be restarted), ``"unplaced"`` (without room in the
            cluster, to be tried again) or ``"failed"`` (given up).
        num_restarts: Number of times that the member was restarted after it had been ready.
        pids: Process id of each rank, rank 0 first; empty unless the replica is up.
        node_ids: Id of each rank's Ray node; empty unless the replica is up.
        metrics: Name of a metric in actors/replica/metrics.py -> value; empty unless the replica is up and the metrics
            were asked for.
        engine: Statistics of the engine (`EngineStats`); None unless the replica is up and they were asked for.
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
        """Process id of rank 0; None unless the replica is up."""
        return self.pids[0] if self.pids else None

    @property
    def node_id(self) -> str | None:
        """Id of the Ray node of rank 0; None unless the replica is up."""
        return self.node_ids[0] if self.node_ids else None


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The state of a pool and its replicas.

    Attributes:
        name: Name of the pool.
        state: ``"ready"`` if any replica is up, ``"starting"`` if none is up and one may come, ``"failed"`` if all
            were given up or have no room, ``"closed"`` after the pool was closed.
        reason: One line that says why a replica was given up or has no room; None if none was.
        pid: Process id of the supervisor.
        replicas: One entry for each replica that the pool has or wants.
    """

    name: str
    state: PoolState
    reason: str | None
    pid: int
    replicas: list[ReplicaStats]
