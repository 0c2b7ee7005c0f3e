"""`EnginePool`: the driver's handle of a pool of engines, with which it starts and closes the pool.

Requests do not pass through the driver: a `PoolClient` in the process that has the rows sends them to the replicas.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import threading
import uuid
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...engine.errors import EngineDeadError, EngineError
from ..config import PoolConfig
from ..stats import PoolStats
from ..view import NAMESPACE, PoolView
from .member import MAX_CALLS
from .placement import reclaim
from .supervisor import Supervisor

__all__ = ["EnginePool", "PoolConfig"]

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
"""Seconds after which a supervisor that does not close is killed; it gives each replica much less time."""

MAX_JOINS = 10
"""Times that joining a pool is tried again because the pool of that name is just closing."""

ENGINE_FIELDS = (
    "engine_kwargs",
    "engine_factory",
    "num_gpus_per_replica",
    "accelerator_type",
    "placement_group_config",
    "runtime_env",
)
"""Settings that must be equal for two users to share one pool."""


class EnginePool:
    """A pool of engines that lives as long as this driver, or until it is closed.

    `EnginePool.start` and `EnginePool.share` make the object. As a context manager it closes the pool at the end.

    Attributes:
        name: Name by which a `PoolClient` finds the pool.
    """

    def __init__(self, name: str, supervisor: Any) -> None:
        self.name = name
        self._supervisor = supervisor
        self._is_closed = threading.Event()
        # A callback, because a waiting thread could keep the driver from ending.
        after_death = functools.partial(_after_death, name, self._is_closed)
        supervisor.presence.remote().future().add_done_callback(after_death)

    @classmethod
    def start(cls, config: PoolConfig) -> Self:
        """Starts a pool and returns at once, while the replicas load their models.

        Args:
            config: Settings of the pool.

        Returns:
            The handle of the pool.
        """
        return cls._join(f"pool-{uuid.uuid4().hex[:12]}", config)

    @classmethod
    def share(cls, config: PoolConfig) -> Self:
        """Joins the pool of this job that runs the same engine on the same resources, or starts it.

        Users whose settings in `ENGINE_FIELDS` are equal share a pool. Its number of replicas is the highest that any
        user has asked for; all other settings are those of the first user. The pool ends when its last user closes it.

        Args:
            config: Settings that this user asks for.

        Returns:
            The handle of the pool.
        """
        return cls._join(f"pool-{ray.get_runtime_context().get_job_id()}-{_engine_digest(config)}", config)

    @classmethod
    def _join(cls, name: str, config: PoolConfig) -> Self:
        # The supervisor runs on the driver's node: the pool ends with the driver anyway, and must not end with another
        # node. The affinity is not soft: Ray 2.60 was seen to place such an actor on another node, where it died.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {
            "name": name,
            "namespace": NAMESPACE,
            "get_if_exists": True,
            "num_cpus": 0,
            "max_concurrency": MAX_CALLS,
            "scheduling_strategy": here,
        }
        actor_class: Any = ray.remote(Supervisor)
        for _ in range(MAX_JOINS):
            supervisor = actor_class.options(**options).remote(name, config)
            with contextlib.suppress(RayActorError):
                if ray.get(supervisor.join.remote(config)):
                    return cls(name, supervisor)
                ray.get(supervisor.presence.remote())  # The pool is closing; its name is free once it is gone.
        raise EngineDeadError(f"pool {name!r}: its supervisor does not stay; Ray's log of actor {name!r} says why")

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until each replica is ready or was given up.

        Args:
            timeout_s: Most seconds to wait; None for no limit.

        Raises:
            UserError: No replica starts because of a wrong setting; the error is the one that the engine raised.
            EngineDeadError: No replica starts, or the pool is closed.
            EngineError: The replicas were not ready within `timeout_s`.
        """
        try:
            view: PoolView = ray.get(self._supervisor.until_settled.remote(), timeout=timeout_s)
        except GetTimeoutError:
            raise EngineError(self._describe_wait(timeout_s)) from None
        except RayActorError:
            raise EngineDeadError(f"pool {self.name!r} is closed; start another one") from None
        if view.state == "failed" and view.failure is not None:
            raise view.failure.to_exception()
        if view.state == "closed":
            raise EngineDeadError(f"pool {self.name!r} is closed; start another one")

    def stats(self, with_engines: bool = False) -> PoolStats:
        """Returns the present state of the pool and its replicas.

        Args:
            with_engines: Whether to ask each replica that is up for its metrics and its engine's statistics.

        Returns:
            The state of the pool, with one entry for each replica.

        Raises:
            EngineDeadError: The pool is closed.
        """
        try:
            stats: PoolStats = ray.get(self._supervisor.stats.remote(with_engines))
        except RayActorError:
            raise EngineDeadError(f"pool {self.name!r} is closed; start another one") from None
        return stats

    def close(self) -> None:
        """Leaves the pool; the last user ends all replicas and waits until they are gone. Repeated calls do nothing."""
        if self._is_closed.is_set() or not ray.is_initialized():
            return
        self._is_closed.set()
        with contextlib.suppress(RayActorError):
            if ray.get(self._supervisor.leave.remote()):
                self._end()

    def _end(self) -> None:
        gone = self._supervisor.presence.remote()
        try:
            ray.get(self._supervisor.close.remote(), timeout=CLOSE_TIMEOUT_S)
        except GetTimeoutError:
            logger.warning("pool %s does not close by itself and is killed", self.name)
        finally:  # Also after an interrupt: killing the supervisor ends the replicas that it owns.
            ray.kill(self._supervisor)
            reclaim(self.name)
        ray.get(gone)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _describe_wait(self, timeout_s: float | None) -> str:
        stats = self.stats()
        states = ", ".join(f"{replica.replica_id} {replica.state}" for replica in stats.replicas)
        reason = f" ({stats.reason})" if stats.reason else ""
        return (
            f"pool {self.name!r} is not ready after {timeout_s:g} s: {states}{reason}. A large model takes its time to "
            "load: wait longer; if replicas stay in 'starting', see whether other jobs hold the cluster's resources"
        )


def _engine_digest(config: PoolConfig) -> str:
    """Returns a digest of the settings that must be equal for two users to share one pool."""
    fields = dataclasses.asdict(config)
    same = {name: value for name, value in fields.items() if name in ENGINE_FIELDS}
    text = json.dumps(same, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _after_death(pool_name: str, is_closed: threading.Event, presence: Future[None]) -> None:
    """Removes the placement groups of a pool whose supervisor died, on a new thread: Ray's thread must not block."""
    if not is_closed.is_set() and isinstance(presence.exception(), RayActorError):
        threading.Thread(target=_reclaim, args=[pool_name], name=f"reclaim-{pool_name}", daemon=True).start()


def _reclaim(pool_name: str) -> None:
    # The driver, and Ray with it, may be ending at this moment; then Ray removes the groups by itself.
    with contextlib.suppress(Exception):
        if ray.is_initialized() and (names := reclaim(pool_name)):
            logger.warning("the supervisor of pool %s died; gave back %s", pool_name, ", ".join(names))
