"""Settings of a pool of engines: `PoolConfig`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..engine.errors import ConfigError
from .engine_thread import Engine
from .replica import build_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """Settings of a pool of engines.

    Attributes:
        engine_kwargs: Keyword arguments of the engine, the model among them.
        num_replicas: Engines to keep alive, each in a process of its own.
        num_cpus_per_replica: CPUs that Ray sets aside for a replica: any share, also 0. It only places the replica; how
            many threads its engine has is said by `num_threads` in `engine_kwargs`, and without it the replicas of a
            node share its cores.
        num_gpus_per_replica: GPUs that Ray sets aside for a replica.
        accelerator_type: Kind of accelerator its node must have, as Ray names it; None for any.
        runtime_env: Ray runtime environment of the replicas; None for the job's own.
        max_attempts: Replicas that may die with a request on board before that request is given up.
        max_start_failures: Starts of a replica that may fail in a row before it is given up. An error in what the user
            gave (a `UserError`) fails every time and is never tried again.
        start_backoff_s: Seconds before a failed start is tried again; they double with each failure in a row.
        engine_factory: Makes the engine from `engine_kwargs` and the number of replicas that share a node; workers must
            be able to import it.
    """

    engine_kwargs: dict[str, Any]
    num_replicas: int = 1
    num_cpus_per_replica: float = 1.0
    num_gpus_per_replica: float = 0.0
    accelerator_type: str | None = None
    runtime_env: dict[str, Any] | None = None
    max_attempts: int = 4
    max_start_failures: int = 3
    start_backoff_s: float = 1.0
    engine_factory: Callable[[dict[str, Any], int], Engine] = build_engine

    def __post_init__(self) -> None:
        for name in ("num_replicas", "max_attempts", "max_start_failures"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1; got {value!r}")
        for name in ("num_cpus_per_replica", "num_gpus_per_replica", "start_backoff_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ConfigError(f"{name} must be a number of at least 0; got {value!r}")
