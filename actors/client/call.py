"""`Call`: one call of `PoolClient.generate`, with its open streams and the requests that a stream has lost."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)

from ...engine.errors import ReplicaDiedError
from ...engine.request import EngineOutput, Request
from ..view import ReplicaHandle
from .connection import PoolConnection
from .suspects import Suspects

LOST = (RayActorError, NodeDiedError, WorkerCrashedError, ObjectLostError, OutOfMemoryError)
"""The errors that Ray raises in place of a result whose replica, or whose node, is gone."""


@dataclass(slots=True)
class Share:
    """The requests of a call that were sent to one replica in one stream.

    Attributes:
        replica: The replica.
        unfinished: Request id -> request, for the requests whose outputs have not come yet.
        is_apart: Whether the requests are suspects, which run on a leased replica without other requests.
    """

    replica: ReplicaHandle
    unfinished: dict[str, Request]
    is_apart: bool


@dataclass(slots=True)
class Lease:
    """The lease of a replica that runs suspects of this call alone; asked for or granted.

    Attributes:
        lease_id: Id under which the supervisor knows the lease.
        answer: Reference that resolves to the replica, or to None, when it is this call's turn.
        replica: The leased replica; None until the lease is granted.
    """

    lease_id: str
    answer: Any
    replica: ReplicaHandle | None = None


class Call:
    """Runs the requests of one call.

    Requests that a replica hands back, by ending its stream early, go to other replicas. Requests that were on board
    when a replica died run on a replica that this call leases, in groups that single out the guilty request
    (`Suspects`).

    Args:
        connection: Connection to the pool.
    """

    def __init__(self, connection: PoolConnection) -> None:
        self._connection = connection
        self._streams: dict[Any, Share] = {}
        self._suspects = Suspects(connection.max_attempts)
        self._lease: Lease | None = None

    def submit(self, requests: list[Request]) -> None:
        """Opens a stream (an `ObjectRefGenerator`) to each replica that gets some of the requests.

        The call waits while no replica is up, unless it has a lease: the leased replica may be the last one of the
        pool, so without other replicas the requests join the suspects, which run there.
        """
        if not requests:
            return
        shares = self._connection.share_out(requests, wait=self._lease is None)
        for replica, chosen in shares:
            self._open(replica, chosen, is_apart=False)
        if not shares:
            self._suspects.put_back(requests)

    @property
    def is_open(self) -> bool:
        """Whether more outputs will come."""
        return bool(self._streams or self._suspects)

    def next_outputs(self, timeout_s: float | None = None) -> Iterator[EngineOutput]:
        """Waits for one event, and yields the outputs that came with it, perhaps none.

        An event is a stream that has outputs or ends, or a lease that is granted or ended.

        Args:
            timeout_s: Most seconds to wait; None for no limit.
        """
        self._ask_for_lease()
        lease = self._lease
        awaited = [*self._streams, *([lease.answer] if lease and not lease.replica else [])]
        ready: list[Any] = ray.wait(awaited, num_returns=1, timeout=timeout_s)[0]
        if lease and ready and ready[0] is lease.answer:
            self._enter(lease)
        elif ready:
            yield from self._read(ready[0])

    def cancel(self) -> None:
        """Cancels the streams of the unfinished requests, and ends the lease."""
        for stream, share in self._streams.items():
            self._connection.release(share.replica, len(share.unfinished))
            if ray.is_initialized():
                ray.cancel(stream)
        self._streams.clear()
        self._end_lease()

    def _open(self, replica: ReplicaHandle, requests: list[Request], *, is_apart: bool) -> None:
        stream = replica.actor.generate.remote(requests, [self._connection.presence], is_apart)
        self._streams[stream] = Share(replica, {request.request_id: request for request in requests}, is_apart)

    def _read(self, stream: Any) -> Iterator[EngineOutput]:
        try:
            chunk = ray.get(next(stream))
        except StopIteration:
            self._take_back(stream)
        except LOST as error:
            yield from self._recover(stream, error)
        else:
            yield from self._take(stream, chunk)

    def _take(self, stream: Any, chunk: list[EngineOutput]) -> Iterator[EngineOutput]:
        share = self._streams[stream]
        for output in chunk:
            del share.unfinished[output.request_id]
            output.metrics.attempt = self._suspects.num_deaths(output.request_id) + 1
            output.metrics.replica_id = share.replica.replica_id
        self._connection.release(share.replica, len(chunk))
        self._connection.count_finished(len(chunk))
        if not share.unfinished:
            del self._streams[stream]
            self._go_on_apart(share)
        yield from chunk

    def _take_back(self, stream: Any) -> None:
        """Handles a stream that ended early: sends the requests that the replica handed back to other replicas."""
        share, lost = self._close(stream)
        self._connection.note_handed_back(share.replica)
        self._run_again(share, lost)
        if share.is_apart:
            self._end_lease()

    def _run_again(self, share: Share, lost: list[Request]) -> None:
        if share.is_apart:
            self._suspects.put_back(lost)
        else:
            self.submit(lost)

    def _recover(self, stream: Any, error: RayError) -> Iterator[EngineOutput]:
        """Handles a lost stream: runs its requests again, except a guilty one, whose failed output it yields."""
        share, lost = self._close(stream)
        ray.cancel(stream)
        if self._connection.ask_how_it_ended(share.replica, error) == "left":
            self._run_again(share, lost)
        elif guilty := self._suspects.note_death(lost, share.is_apart):
            yield self._died_too_often(guilty, share.replica)
        if share.is_apart:
            self._end_lease()

    def _close(self, stream: Any) -> tuple[Share, list[Request]]:
        share = self._streams.pop(stream)
        self._connection.release(share.replica, len(share.unfinished))
        return share, list(share.unfinished.values())

    def _ask_for_lease(self) -> None:
        if self._suspects and self._lease is None:
            lease_id = uuid.uuid4().hex
            self._lease = Lease(lease_id, self._connection.ask_for_lease(lease_id))

    def _enter(self, lease: Lease) -> None:
        lease.replica = self._connection.get_leased(lease.answer)
        if lease.replica is None:
            self._end_lease()
        else:
            self._run_group(lease.replica)

    def _go_on_apart(self, share: Share) -> None:
        if share.is_apart and self._suspects:
            self._run_group(share.replica)
        elif share.is_apart:
            self._end_lease()

    def _run_group(self, replica: ReplicaHandle) -> None:
        group = self._suspects.next_group()
        self._connection.count_in_flight(replica, len(group))
        self._open(replica, group, is_apart=True)

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._connection.end_lease(self._lease.lease_id)
            self._lease = None

    def _died_too_often(self, request: Request, last: ReplicaHandle) -> EngineOutput:
        count = self._suspects.num_deaths(request.request_id)
        error = ReplicaDiedError(
            f"{count} replica(s) died with request {request.request_id!r} on board, lastly {last.replica_id}, where it "
            "was alone; the log of that replica says why. Take the request out; if the machines are the cause, raise "
            "max_attempts"
        )
        output = request.failed(error)
        output.metrics.attempt, output.metrics.replica_id = count, last.replica_id
        return output
