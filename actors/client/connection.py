"""What a client knows of its pool: the replicas that are up, what each has on board, and how a lost one ended."""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from ...engine.errors import EngineDeadError
from ...engine.request import Request
from ..replica.replica import Reference
from ..view import NAMESPACE, Loss, PoolView, ReplicaHandle
from .routing import Router

UNREACHABLE_TIMEOUT_S = 60.0
"""Seconds for which a replica that cannot be reached is asked again before it counts as dead."""


class PoolConnection:
    """Connects a process to a pool. Any thread may use it.

    The supervisor is asked which replicas there are, and answers when that changes. It is also asked how a lost replica
    ended. Requests do not pass through it.

    Args:
        pool_name: Name of an `EnginePool` of this cluster.

    Attributes:
        presence: A reference that this process owns and that never resolves. A replica that awaits it gets an error
            when this process dies.

    Raises:
        EngineDeadError: There is no such pool.
    """

    def __init__(self, pool_name: str) -> None:
        self._pool_name = pool_name
        try:
            self._supervisor: Any = ray.get_actor(pool_name, namespace=NAMESPACE)
        except ValueError:
            raise self._gone() from None
        self.presence: Reference = self._supervisor.presence.remote()
        self._router: Router = Router()
        self._lock: threading.Lock = threading.Lock()
        self._dead: set[str] = set()
        self._closed_at: dict[str, int] = {}
        self._num_finished: int = 0
        self._view: PoolView = self._ask(self._supervisor.view.remote())
        self._next_view: Reference = self._supervisor.view.remote(self._view.version)

    @property
    def max_attempts(self) -> int:
        """Deaths before a request can be given up."""
        return self._view.max_attempts

    def share_out(self, requests: list[Request], *, wait: bool = True) -> list[tuple[ReplicaHandle, list[Request]]]:
        """Chooses where requests run.

        Args:
            requests: Requests to run.
            wait: Whether to wait while no replica is up.

        Returns:
            Replicas with their requests, which count as theirs until `release`; nothing if none is up and it is not
            waited for.

        Raises:
            EngineDeadError: No replica will ever be up.
        """
        replicas = {replica.replica_id: replica for replica in self._ready_replicas(wait)}
        shares = self._router.share_out(requests, list(replicas)) if replicas else {}
        return [(replicas[replica_id], share) for replica_id, share in shares.items()]

    def count_in_flight(self, replica: ReplicaHandle, count: int) -> None:
        """Counts requests as a replica's until `release`."""
        self._router.release(replica.replica_id, -count)

    def release(self, replica: ReplicaHandle, count: int) -> None:
        """Counts requests as gone from a replica."""
        self._router.release(replica.replica_id, count)

    def count_finished(self, count: int) -> None:
        """Counts outputs, for the next report of a loss."""
        with self._lock:
            self._num_finished += count

    def note_handed_back(self, replica: ReplicaHandle) -> None:
        """Gives a replica nothing more until the supervisor says so in a later view: it drains or is set apart."""
        with self._lock:
            self._closed_at[replica.replica_id] = max(replica.version, self._closed_at.get(replica.replica_id, -1))

    def ask_how_it_ended(self, replica: ReplicaHandle, error: RayError) -> Loss:
        """Finds out what became of a replica that lost requests; a dead one gets no more of them.

        Args:
            replica: The replica.
            error: What came instead of a result.

        Raises:
            EngineDeadError: The pool is closed.
        """
        if not isinstance(error, ActorDiedError) and self._answers(replica):
            return "died"  # Its results were lost rather than the replica. Counted, so that it cannot go on for ever.
        with self._lock:
            self._dead.add(replica.replica_id)
            num_finished, self._num_finished = self._num_finished, 0
        loss: Loss = self._ask(self._supervisor.report_loss.remote(replica.replica_id, num_finished))
        return loss

    def ask_for_lease(self, lease_id: str) -> Reference:
        """Asks for a replica for one call alone; it must be ended with `end_lease`, also before it is granted."""
        lease: Reference = self._supervisor.lease.remote(lease_id, [self.presence])
        return lease

    def get_leased(self, answer: Reference) -> ReplicaHandle | None:
        """Returns the replica that was granted; None if the wish was ended or there is none left.

        Raises:
            EngineDeadError: The pool gave up all replicas, or is closed.
        """
        replica: ReplicaHandle | None = self._ask(answer)
        if replica is None:
            self._ready_replicas(wait=False)
        return replica

    def end_lease(self, lease_id: str) -> None:
        """Gives the replica of a lease back to everyone."""
        if ray.is_initialized():
            self._supervisor.end_lease.remote(lease_id)

    def _answers(self, replica: ReplicaHandle) -> bool:
        """Asks a replica for a sign of life; one that cannot be reached may only be behind a broken connection."""
        calls = Retrying(
            retry=retry_if_exception_type(ActorUnavailableError),
            wait=wait_exponential(multiplier=0.1, max=5.0),
            stop=stop_after_delay(UNREACHABLE_TIMEOUT_S),
            reraise=True,
        )
        try:
            calls(lambda: ray.get(replica.actor.ready.remote()))
        except RayError:
            return False
        return True

    def _ready_replicas(self, wait: bool = True) -> list[ReplicaHandle]:
        while True:
            view, following = self._refresh()
            ready = [replica for replica in view.replicas if self._takes_requests(replica)]
            if ready or not (wait or view.state in ("failed", "closed")):
                return ready
            if view.state == "failed" and view.failure is not None:
                raise EngineDeadError(
                    f"pool {self._pool_name!r} gave up, no replica is left: {view.failure.kind}: {view.failure.message}"
                )
            if view.state == "closed":
                raise self._gone()
            ray.wait([following])

    def _takes_requests(self, replica: ReplicaHandle) -> bool:
        return replica.replica_id not in self._dead and self._closed_at.get(replica.replica_id, -1) < replica.version

    def _refresh(self) -> tuple[PoolView, Reference]:
        """Takes in the supervisor's next view if it has come; no call leaves this process if it has not."""
        with self._lock:
            if ray.wait([self._next_view], timeout=0)[0]:
                self._view = self._ask(self._next_view)
                self._next_view = self._supervisor.view.remote(self._view.version)
            return self._view, self._next_view

    def _ask(self, ref: Reference) -> Any:
        try:
            return ray.get(ref)
        except RayActorError:
            raise self._gone() from None

    def _gone(self) -> EngineDeadError:
        return EngineDeadError(
            f"there is no pool {self._pool_name!r}: it was closed, its driver ended, or it never was; start one with "
            "EnginePool.start and keep it open while it is used"
        )
