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
    """The connection of a client to a pool: chooses replicas, and counts the requests in flight. Thread-safe.

    It asks the supervisor of the pool for the list of the replicas, for each change of the list, for leases, and how a
    lost replica ended. Requests do not pass through the supervisor.

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
        """Number of replicas that must die with a request on board before it can be given up; see `PoolConfig`."""
        return self._view.max_attempts

    def share_out(self, requests: list[Request], *, wait: bool = True) -> list[tuple[ReplicaHandle, list[Request]]]:
        """Chooses a replica for each request, and counts the request as in flight there until `release`.

        Args:
            requests: Requests to run.
            wait: Whether to wait while no replica is up.

        Returns:
            Pairs (replica, requests that it is to run); an empty list if no replica is up and `wait` is False.

        Raises:
            EngineDeadError: The pool gave up all replicas, or is closed.
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
        """Adds `count` to the number of received outputs, which the supervisor gets when a replica is lost next."""
        with self._lock:
            self._num_finished += count

    def note_handed_back(self, replica: ReplicaHandle) -> None:
        """Excludes a replica that handed requests back from `share_out`, until a later view lists it as ready."""
        with self._lock:
            self._closed_at[replica.replica_id] = max(replica.version, self._closed_at.get(replica.replica_id, -1))

    def ask_how_it_ended(self, replica: ReplicaHandle, error: RayError) -> Loss:
        """Finds out how a lost replica ended, and excludes it from `share_out` unless it still answers.

        Args:
            replica: The replica.
            error: The error that Ray raised in place of a result.

        Returns:
            ``"died"`` if a request may be to blame, also if the replica still answers; ``"left"`` if not.

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
        """Asks the supervisor to lease a replica to one call alone. The caller must call `end_lease` in any case.

        Args:
            lease_id: A new id that names the lease.

        Returns:
            The reference of the answer, for `get_leased`.
        """
        lease: Reference = self._supervisor.lease.remote(lease_id, [self.presence])
        return lease

    def get_leased(self, answer: Reference) -> ReplicaHandle | None:
        """Waits for the answer to `ask_for_lease` and returns the leased replica.

        The result is None if the lease was ended, or if no replica is left.

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
        """Returns whether a replica answers; an unreachable one is called again for `UNREACHABLE_TIMEOUT_S`."""
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

        If a new view has arrived, the method asks the supervisor for the next one; otherwise it sends nothing.
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
