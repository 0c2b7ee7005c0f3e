"""`PoolView`: the replicas that clients can use, as data that the supervisor sends them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..engine.errors import RequestError
from .stats import PoolState

NAMESPACE = "millrace"
"""Ray namespace of all supervisors, so that a client finds its pool from any namespace."""

Loss = Literal["died", "left"]
"""How a replica ended: it died, perhaps because of a request; or it left, on purpose or together with its node."""


@dataclass(frozen=True, slots=True)
class ReplicaHandle:
    """A replica to which clients send requests.

    Attributes:
        replica_id: Id of the replica; a restarted replica has another one.
        actor: Ray's handle of the actor of rank 0.
        version: Version of the pool's view when the handle was made.
    """

    replica_id: str
    actor: Any
    version: int


@dataclass(frozen=True, slots=True)
class PoolView:
    """The state of a pool as the supervisor sends it to clients.

    Attributes:
        version: Number of changes of the pool so far; a larger version is later.
        state: As in `PoolStats`.
        failure: The latest reason why a replica was given up or has no room; None if there is none.
        max_attempts: As in `PoolConfig`.
        replicas: The replicas that take requests.
    """

    version: int
    state: PoolState
    failure: RequestError | None
    max_attempts: int
    replicas: tuple[ReplicaHandle, ...]
