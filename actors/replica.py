"""One engine in a Ray actor: requests in, finished outputs streamed out.

`EngineReplica` is a plain class that the supervisor makes an actor of. All its methods are coroutines, so that any
number of calls are open at once; the engine runs on its own thread and is never touched from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from ..engine.errors import EngineDeadError, MillraceError
from ..engine.outputs import RequestOutput
from ..engine.request import GenerateRequest
from .engine_thread import Engine, EngineThread, Submission

Reference = ray.ObjectRef[Any]


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """Where a replica runs.

    Attributes:
        pid: Its process.
        node_id: Its Ray node, in hexadecimal.
    """

    pid: int
    node_id: str


def build_engine(engine_kwargs: dict[str, Any], num_sharing: int = 1) -> Engine:
    """Builds the engine of this package; torch is loaded here and not before.

    Args:
        engine_kwargs: Keyword arguments of `EngineConfig.from_kwargs`. Without `num_threads` the engine gets its share
            of this node's cores.
        num_sharing: Replicas that share them.

    Returns:
        The engine with its model loaded.
    """
    from ..engine.config import EngineConfig
    from ..engine.device import num_physical_cores
    from ..engine.engine import LLMEngine

    settings = dict(engine_kwargs)
    if settings.get("num_threads") is None:
        # Not the engine's own default: Ray sets OMP_NUM_THREADS in its workers to the CPUs that it set aside.
        settings["num_threads"] = share_of_cores(num_physical_cores(), _node_cpus(), num_sharing)
    return LLMEngine.from_config(EngineConfig.from_kwargs(**settings))


def share_of_cores(num_cores: int, num_cpus: float, num_sharing: int) -> int:
    """Returns the threads of an engine that shares its node with others.

    Threads of an engine wait for each other at every layer: one more than there are free cores, and all of them wait
    for the scheduler of the operating system instead.

    Args:
        num_cores: Physical cores of the node.
        num_cpus: CPUs of the node that Ray may use.
        num_sharing: Engines on the node.
    """
    return max(1, int(min(num_cores, num_cpus)) // num_sharing)


def _node_cpus() -> float:
    node_id = ray.get_runtime_context().get_node_id()
    cpus: float = next(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == node_id)
    return cpus


class EngineReplica:
    """One engine in an actor.

    The model loads after construction, on the engine's thread; `ready` says how that went. When the engine itself
    fails, the process ends: its supervisor starts another one.

    Args:
        replica_id: Its name, shown in front of its log lines.
        engine_kwargs: What `engine_factory` takes.
        engine_factory: Makes the engine.
        num_sharing: Replicas that share this node's cores.
    """

    def __init__(
        self,
        replica_id: str,
        engine_kwargs: dict[str, Any],
        engine_factory: Callable[[dict[str, Any], int], Engine] = build_engine,
        num_sharing: int = 1,
    ) -> None:
        self._replica_id = replica_id
        self._engine = EngineThread(lambda: engine_factory(engine_kwargs, num_sharing), on_fatal=lambda: os._exit(1))
        self._submissions: dict[Reference, set[Submission]] = {}
        self._watchers: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"EngineReplica({self._replica_id})"

    async def ready(self) -> ReplicaInfo:
        """Waits until the model is loaded.

        Returns:
            Where the replica runs.

        Raises:
            MillraceError: The model did not load. An error that is not of our tree is an `EngineDeadError` that names
                its type, so that it can cross to any process.
        """
        try:
            await asyncio.wrap_future(self._engine.loaded)
        except MillraceError:
            raise
        except Exception as exc:
            raise EngineDeadError(f"{type(exc).__name__}: {exc}") from exc
        return ReplicaInfo(os.getpid(), ray.get_runtime_context().get_node_id())

    @ray.method(num_returns="streaming")
    async def generate(
        self, requests: list[GenerateRequest], caller: Sequence[Reference] = ()
    ) -> AsyncIterator[list[RequestOutput]]:
        """Runs requests and yields them as they finish.

        Args:
            requests: Requests with different ids. One that the engine refuses comes back with an error.
            caller: At most one reference that is never resolved and that the caller owns (in a list: Ray waits for a
                bare one). When its owner dies, what is unfinished is dropped. Without it, only cancelling drops it.

        Yields:
            Whatever finished since the last time, at least one output.
        """
        arrived: asyncio.Queue[list[RequestOutput]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(outputs: list[RequestOutput]) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, outputs)

        submission = self._engine.submit(requests, deliver)
        try:
            self._watch(caller, submission)
            num_left = len(requests)
            while num_left and self._is_there(caller):
                chunk = await arrived.get()
                while not arrived.empty():
                    chunk += arrived.get_nowait()
                num_left -= len(chunk)
                if chunk:
                    yield chunk
        finally:
            self._engine.abort(submission)
            self._unwatch(caller, submission)

    async def stats(self) -> Any:
        """Returns the engine's counters, read between two steps."""
        return await asyncio.wrap_future(self._engine.ask(lambda engine: engine.stats()))

    async def until_death(self) -> None:
        """Never returns: the call fails when this process dies, which is how the supervisor learns of it."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Drops what is unfinished and frees what the engine holds; the process stays until it is killed."""
        await asyncio.wrap_future(self._engine.close())

    def _watch(self, caller: Sequence[Reference], submission: Submission) -> None:
        for presence in caller:
            if presence not in self._submissions:
                self._submissions[presence] = set()
                task = asyncio.create_task(self._abort_after(presence))
                self._watchers.add(task)
                task.add_done_callback(self._watchers.discard)
            self._submissions[presence].add(submission)

    def _is_there(self, caller: Sequence[Reference]) -> bool:
        return all(presence in self._submissions for presence in caller)

    def _unwatch(self, caller: Sequence[Reference], submission: Submission) -> None:
        for presence in caller:
            self._submissions.get(presence, set()).discard(submission)

    async def _abort_after(self, presence: Reference) -> None:
        """Waits for the end of a caller, one watch for all its calls, and drops what it has left here."""
        with contextlib.suppress(RayError):
            await presence
        for submission in self._submissions.pop(presence):
            self._engine.abort(submission)
            submission.deliver([])
