"""`PoolConnection`: the replicas that a client can use, how many requests each has, and how a lost replica ended."""

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
        """Deaths of replicas before a request can be given up."""
        return self._view.max_attempts

    def share_out(self, requests: list[Request], *, wait: bool = True) -> list[tuple[ReplicaHandle, list[Request]]]:
        """Chooses the replicas that run some requests.

        Args:
            requests: Requests to run.
            wait: Whether to wait while no replica is up.

        Returns:
            Replicas with their requests, which are counted there until `release`; an empty list if no replica is up and
            the call does not wait.

        Raises:
            EngineDeadError: No replica will ever be up.
        """
        replicas = {replica.replica_id: replica for replica in self._ready_replicas(wait)}
        shares = self._router.share_out(requests, list(replicas)) if replicas else {}
        return [(replicas[replica_id], share) for replica_id, share in shares.items()]

    def count_in_flight(self, replica: ReplicaHandle, count: int) -> None:
        """Adds `count` to the number of requests that a replica runs for this client; `release` subtracts them."""
        self._router.release(replica.replica_id, -count)

    def release(self, replica: ReplicaHandle, count: int) -> None:
        """Subtracts `count` from the number of requests that a replica runs for this client."""
        self._router.release(replica.replica_id, count)

    def count_finished(self, count: int) -> None:
        """Adds to the number of finished outputs, which the supervisor gets when a replica is lost the next time."""
        with self._lock:
            self._num_finished += count

    def note_handed_back(self, replica: ReplicaHandle) -> None:
        """Sends no more requests to a draining or quarantined replica, until a later view lists it as ready."""
        with self._lock:
            self._closed_at[replica.replica_id] = max(replica.version, self._closed_at.get(replica.replica_id, -1))

    def ask_how_it_ended(self, replica: ReplicaHandle, error: RayError) -> Loss:
        """Finds out how a replica ended whose requests were lost. A dead replica gets no more requests.

        Args:
            replica: The replica.
            error: The error that Ray raised in place of a result.

        Raises:
            EngineDeadError: The pool is closed.
        """
        if not isinstance(error, ActorDiedError) and self._answers(replica):
            return "died"  # Only its results were lost. This counts as a death, so that it cannot repeat for ever.
        with self._lock:
            self._dead.add(replica.replica_id)
            num_finished, self._num_finished = self._num_finished, 0
        loss: Loss = self._ask(self._supervisor.report_loss.remote(replica.replica_id, num_finished))
        return loss

    def ask_for_lease(self, lease_id: str) -> Reference:
        """Asks the supervisor to lease a replica to one call alone, and returns the reference of the answer.

        `end_lease` must follow, even if the lease is never granted.
        """
        lease: Reference = self._supervisor.lease.remote(lease_id, [self.presence])
        return lease

    def get_leased(self, answer: Reference) -> ReplicaHandle | None:
        """Returns the leased replica; None if the lease was ended or no replica is left.

        Raises:
            EngineDeadError: The pool gave up all replicas, or is closed.
        """
        replica: ReplicaHandle | None = self._ask(answer)
        if replica is None:
            self._ready_replicas(wait=False)
        return replica

    def end_lease(self, lease_id: str) -> None:
        """Ends a lease, so that its replica serves all clients again."""
        if ray.is_initialized():
            self._supervisor.end_lease.remote(lease_id)

    def _answers(self, replica: ReplicaHandle) -> bool:
        """Returns whether a replica answers; it is asked repeatedly, because a connection may be broken for a while."""
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
        """Returns the latest view of the pool that has arrived from the supervisor, and the reference of the next one.

        If a new view has arrived, it asks for the one after it; otherwise it sends nothing.
        """
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
