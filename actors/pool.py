"""The driver's handle of a pool of engines: `EnginePool`.

It starts and closes; requests go through `PoolClient`, straight from where the rows are to the replicas.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..engine.errors import EngineDeadError, EngineError
from .config import PoolConfig
from .placement import check_placeable
from .stats import PoolStats
from .supervisor import MAX_CALLS, NAMESPACE, PoolView, Supervisor

__all__ = ["EnginePool", "PoolConfig"]

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
"""Seconds after which a supervisor that does not close is killed: several times what it gives a replica."""


class EnginePool:
    """A pool of engines that lives as long as this driver, or until it is closed.

    Use `EnginePool.start`. It is a context manager that closes the pool.

    Attributes:
        name: What a `PoolClient` finds it by.
    """

    def __init__(self, name: str, supervisor: Any) -> None:
        self.name = name
        self._supervisor = supervisor
        self._is_closed = False

    @classmethod
    def start(cls, config: PoolConfig) -> Self:
        """Starts a pool and returns at once; the models load meanwhile.

        Args:
            config: Settings.

        Returns:
            The handle.

        Raises:
            ConfigError: The cluster can never hold the replicas.
        """
        check_placeable(config)
        name = f"pool-{uuid.uuid4().hex[:12]}"
        # On the driver's node: the pool cannot outlive the driver anyway, and must not go with any other node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor_class: Any = ray.remote(Supervisor)
        supervisor = actor_class.options(
            name=name, namespace=NAMESPACE, num_cpus=0, max_concurrency=MAX_CALLS, scheduling_strategy=here
        ).remote(name, config)
        supervisor.start.remote()
        return cls(name, supervisor)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until each replica is ready or was given up.

        Args:
            timeout_s: Seconds to wait at most; None for as long as it takes.

        Raises:
            UserError: No replica starts, because of something given; the error is the one the engine raised.
            EngineDeadError: No replica starts, or the pool is closed.
            EngineError: It took longer than `timeout_s`.
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
        """Describes the pool and its replicas.

        Args:
            with_engines: Whether to ask each ready replica for its engine's counters.

        Returns:
            The pool as it is now.

        Raises:
            EngineDeadError: The pool is closed.
        """
        try:
            stats: PoolStats = ray.get(self._supervisor.stats.remote(with_engines))
        except RayActorError:
            raise EngineDeadError(f"pool {self.name!r} is closed; start another one") from None
        return stats

    def close(self) -> None:
        """Ends all replicas and their supervisor; returns when they are gone. A second call does nothing."""
        if self._is_closed or not ray.is_initialized():
            return
        self._is_closed = True
        gone = self._supervisor.presence.remote()
        with contextlib.suppress(RayActorError):
            try:
                ray.get(self._supervisor.close.remote(), timeout=CLOSE_TIMEOUT_S)
            except GetTimeoutError:
                logger.warning("pool %s does not close by itself and is killed", self.name)
            finally:  # Also when interrupted: Ray ends the replicas with their owner.
                ray.kill(self._supervisor)
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
