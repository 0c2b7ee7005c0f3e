"""The way from a worker that has rows to the replicas: `PoolClient`.

It calls the replicas directly; the supervisor is asked only who they are, and answers when that changes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from ..engine.errors import EngineDeadError, ReplicaDiedError, UserError
from ..engine.outputs import RequestOutput
from ..engine.request import GenerateRequest
from .replica import Reference
from .routing import Router
from .supervisor import NAMESPACE, PoolView, ReplicaHandle

UNREACHABLE_TIMEOUT_S = 60.0

_LOST = (RayActorError, NodeDiedError, WorkerCrashedError, ObjectLostError, OutOfMemoryError)
"""What a result is replaced by when its replica, or the node that held the result, is gone."""


class PoolClient:
    """Runs requests on the replicas of a pool. Any thread may use it; one is enough for a process.

    Args:
        pool_name: Name of an `EnginePool` of this cluster.

    Raises:
        EngineDeadError: There is no such pool.
    """

    def __init__(self, pool_name: str) -> None:
        self._pool_name = pool_name
        try:
            self._supervisor: Any = ray.get_actor(pool_name, namespace=NAMESPACE)
        except ValueError:
            raise self._gone() from None
        # Belongs to this process and never resolves: the replicas wait for it and so hear of this process's death.
        self._presence: Reference = self._supervisor.presence.remote()
        self._router: Router = Router()
        self._lock: threading.Lock = threading.Lock()
        self._dead: set[str] = set()
        self._view: PoolView = self._get_view(self._supervisor.view.remote())
        self._next_view: Reference = self._supervisor.view.remote(self._view.version)

    def generate(self, requests: list[GenerateRequest]) -> Iterator[RequestOutput]:
        """Runs requests and yields each as it finishes, wherever it ran, exactly once.

        Requests of a replica that dies go to another one; they wait for one if none is up. Closing the generator before
        its end takes back what is unfinished.

        Args:
            requests: Requests with different ids.

        Yields:
            Outputs in the order in which they finish. A request that fails has `error` set; the kind is
            ``"ReplicaDiedError"`` if `max_attempts` replicas died with it.

        Raises:
            UserError: Two requests have the same id.
            EngineDeadError: The pool gave up all replicas, or is closed.
        """
        if len({request.request_id for request in requests}) < len(requests):
            twice = [name for name, count in Counter(r.request_id for r in requests).items() if count > 1]
            raise UserError(f"request ids must differ within a call; given twice or more: {', '.join(twice)}")
        call = _Call(self._presence, self)
        try:
            call.submit(requests)
            yield from call.outputs()
        finally:
            call.cancel()

    @property
    def max_attempts(self) -> int:
        """Replicas that may die with a request on board."""
        return self._view.max_attempts

    def share_out(self, requests: list[GenerateRequest]) -> list[tuple[ReplicaHandle, list[GenerateRequest]]]:
        """Chooses where requests run; waits while no replica is up.

        Args:
            requests: Requests to run.

        Returns:
            Replicas with their requests, which count as theirs until `release`.

        Raises:
            EngineDeadError: No replica will ever be up.
        """
        replicas = {replica.replica_id: replica for replica in self._ready_replicas()}
        shares = self._router.share_out(requests, list(replicas))
        return [(replicas[replica_id], share) for replica_id, share in shares.items()]

    def release(self, replica: ReplicaHandle, count: int) -> None:
        """Counts requests as gone from a replica."""
        self._router.release(replica.replica_id, count)

    def note_loss(self, replica: ReplicaHandle, error: RayError | None) -> None:
        """Finds out whether a replica that lost requests is dead, so that it gets no more of them.

        Args:
            replica: The replica.
            error: What came instead of a result; None if the results just ended.
        """
        if isinstance(error, ActorDiedError) or not self._answers(replica):
            with self._lock:
                self._dead.add(replica.replica_id)

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

    def _ready_replicas(self) -> list[ReplicaHandle]:
        while True:
            view, following = self._refresh()
            ready = [replica for replica in view.replicas if replica.replica_id not in self._dead]
            if ready:
                return ready
            if view.state == "failed" and view.failure is not None:
                raise EngineDeadError(
                    f"pool {self._pool_name!r} gave up, no replica starts: {view.failure.kind}: {view.failure.message}"
                )
            if view.state == "closed":
                raise self._gone()
            ray.wait([following])

    def _refresh(self) -> tuple[PoolView, Reference]:
        """Takes in the supervisor's next view if it has come; no call leaves this process if it has not."""
        with self._lock:
            if ray.wait([self._next_view], timeout=0)[0]:
                self._view = self._get_view(self._next_view)
                self._next_view = self._supervisor.view.remote(self._view.version)
            return self._view, self._next_view

    def _get_view(self, ref: Reference) -> PoolView:
        try:
            view: PoolView = ray.get(ref)
        except RayActorError:
            raise self._gone() from None
        return view

    def _gone(self) -> EngineDeadError:
        return EngineDeadError(
            f"there is no pool {self._pool_name!r}: it was closed, its driver ended, or it never was; start one with "
            "EnginePool.start and keep it open while it is used"
        )


@dataclass(slots=True)
class _Share:
    """What one replica still owes a call."""

    replica: ReplicaHandle
    unfinished: dict[str, GenerateRequest]


class _Call:
    """One call of `PoolClient.generate`: its open streams and its requests' deaths."""

    def __init__(self, presence: Reference, client: PoolClient) -> None:
        self._presence = presence
        self._client = client
        self._streams: dict[Any, _Share] = {}
        self._num_deaths: Counter[str] = Counter()

    def submit(self, requests: list[GenerateRequest]) -> None:
        """Opens a stream (an `ObjectRefGenerator`) to each replica that gets some of the requests."""
        if not requests:
            return
        for replica, chosen in self._client.share_out(requests):
            stream = replica.actor.generate.remote(chosen, [self._presence])
            self._streams[stream] = _Share(replica, {request.request_id: request for request in chosen})

    def outputs(self) -> Iterator[RequestOutput]:
        """Yields outputs from all streams until none is open."""
        while self._streams:
            ready: list[Any] = ray.wait(list(self._streams), num_returns=1)[0]
            stream = ready[0]
            try:
                chunk = ray.get(next(stream))
            except StopIteration:
                yield from self._recover(stream, None)
            except _LOST as error:
                yield from self._recover(stream, error)
            else:
                yield from self._take(stream, chunk)

    def cancel(self) -> None:
        """Takes back what is unfinished."""
        for stream, share in self._streams.items():
            self._client.release(share.replica, len(share.unfinished))
            if ray.is_initialized():
                ray.cancel(stream)
        self._streams.clear()

    def _take(self, stream: Any, chunk: list[RequestOutput]) -> Iterator[RequestOutput]:
        share = self._streams[stream]
        for output in chunk:
            del share.unfinished[output.request_id]
            output.metrics.attempt = self._num_deaths[output.request_id] + 1
            output.metrics.replica_id = share.replica.replica_id
        self._client.release(share.replica, len(chunk))
        if not share.unfinished:
            del self._streams[stream]
        yield from chunk

    def _recover(self, stream: Any, error: RayError | None) -> Iterator[RequestOutput]:
        """Sends what a stream lost elsewhere; yields those requests that were lost too often."""
        share = self._streams.pop(stream)
        self._client.release(share.replica, len(share.unfinished))
        ray.cancel(stream)
        self._client.note_loss(share.replica, error)
        self._num_deaths.update(share.unfinished.keys())
        max_attempts = self._client.max_attempts
        lost = list(share.unfinished.values())
        self.submit([request for request in lost if self._num_deaths[request.request_id] < max_attempts])
        for request in lost:
            if self._num_deaths[request.request_id] >= max_attempts:
                yield self._died_too_often(request, share.replica)

    def _died_too_often(self, request: GenerateRequest, last: ReplicaHandle) -> RequestOutput:
        count = self._num_deaths[request.request_id]
        error = ReplicaDiedError(
            f"{count} replica(s) died with request {request.request_id!r} on board, lastly {last.replica_id}, and "
            f"max_attempts is {self._client.max_attempts}; the log of that replica says why. If the request is the "
            "cause, take it out; if the machines are, raise max_attempts"
        )
        output = RequestOutput.from_error(request.request_id, error, request.prompt, request.prompt_token_ids)
        output.metrics.attempt, output.metrics.replica_id = count, last.replica_id
        return output
