"""What a pool shows its clients: which replicas there are, as plain data that crosses processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..engine.errors import RequestError
from .stats import PoolState

NAMESPACE = "millrace"
"""Ray namespace of the supervisors, so that a client finds its pool from whatever namespace it runs in."""

Loss = Literal["died", "left"]
"""How a replica ended: by itself, perhaps because of a request; or on purpose or with its node, whatever it ran."""


@dataclass(frozen=True, slots=True)
class ReplicaHandle:
    """A replica that is ready.

    Attributes:
        replica_id: Its name; a restarted replica has another one.
        actor: Ray's handle of it.
        version: Of the view it was seen in.
    """

    replica_id: str
    actor: Any
    version: int


@dataclass(frozen=True, slots=True)
class PoolView:
    """What a client needs to know of a pool.

    Attributes:
        version: Counts the changes.
        state: As in `PoolStats`.
        failure: Why a replica was given up, lastly; None if none was.
        max_attempts: As in `PoolConfig`.
        replicas: Those that take requests.
    """

    version: int
    state: PoolState
    failure: RequestError | None
    max_attempts: int
    replicas: tuple[ReplicaHandle, ...]
