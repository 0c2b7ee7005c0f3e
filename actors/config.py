"""Settings of a pool of engines: `PoolConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..engine.errors import ConfigError
from .replica.ranks import EngineFactory, RankMain, build_engine, run_rank
from .supervisor.placement import Placement

DEFAULT_REQUESTS_PER_REPLICA = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """Settings of a pool of engines.

    Attributes:
        engine_kwargs: Keyword arguments of `EngineConfig.from_kwargs`, the model among them.
        num_replicas: Number of replicas to keep alive. With (min, max) the pool grows and shrinks with the number of
            requests.
        num_cpus_per_replica: CPUs that Ray reserves for a replica: any number, also a fraction or 0. They only decide
            where the replica is placed. `num_threads` in `engine_kwargs` sets the threads of its engine; without it the
            replicas of a node share the cores of the node.
        num_gpus_per_replica: GPUs that Ray reserves for a replica, all its ranks together.
        accelerator_type: Accelerator type that the nodes of the replicas must have, as Ray names it; None for any.
        placement_group_config: Resources of each rank and the strategy that spreads ranks over nodes, as in Ray Data
            LLM. It replaces `num_cpus_per_replica` and `num_gpus_per_replica`. With None each rank gets an even share
            of these two, and all ranks are on one node if a node is large enough.
        placement_timeout_s: Seconds that a replica waits for room in the cluster.
        runtime_env: Ray runtime environment of the replicas; None for the job's own.
        max_attempts: Number of replicas that must die with a request on board before it is given up; at the last death
            it must have been alone.
        max_start_failures: Failed starts in a row after which a replica is given up. A start that fails with a
            `UserError` would fail every time, so it is not repeated.
        max_deaths_in_a_row: Deaths in a row, with no request finished between them on any replica, after which the pool
            is given up.
        start_backoff_s: Seconds before a failed start is repeated; they double with each failure in a row.
        step_timeout_s: Most seconds of a step. When a step takes longer, all ranks of the replica write their stacks to
            their logs, and the replica dies. The first eight steps may take five times as long, for they may compile
            kernels.
        requests_per_replica: Requests on board of each replica beyond which a growing pool starts another one; None for
            the engine's `max_num_seqs`.
        scale_down_delay_s: Seconds for which the pool must have had too many replicas before one is drained.
        engine_factory: Function that makes the engine, in rank 0; Ray's workers must be able to import it.
        rank_main: Function that the other ranks of a replica run.
    """

    engine_kwargs: dict[str, Any]
    num_replicas: int | tuple[int, int] = 1
    num_cpus_per_replica: float = 1.0
    num_gpus_per_replica: float = 0.0
    accelerator_type: str | None = None
    placement_group_config: dict[str, Any] | None = None
    placement_timeout_s: float = 30.0
    runtime_env: dict[str, Any] | None = None
    max_attempts: int = 2
    max_start_failures: int = 3
    max_deaths_in_a_row: int = 10
    start_backoff_s: float = 1.0
    step_timeout_s: float = 600.0
    requests_per_replica: int | None = None
    scale_down_delay_s: float = 30.0
    engine_factory: EngineFactory = build_engine
    rank_main: RankMain = run_rank

    def __post_init__(self) -> None:
        for name in ("max_attempts", "max_start_failures", "max_deaths_in_a_row"):
            _check_count(name, getattr(self, name))
        if self.requests_per_replica is not None:
            _check_count("requests_per_replica", self.requests_per_replica)
        for name in ("num_cpus_per_replica", "num_gpus_per_replica", "start_backoff_s", "scale_down_delay_s"):
            _check_number(name, getattr(self, name))
        for name in ("placement_timeout_s", "step_timeout_s"):
            _check_number(name, getattr(self, name))
            if not getattr(self, name):
                raise ConfigError(f"{name} must be a number of more than 0; got 0")
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            _check_count(name, self.engine_kwargs.get(name, 1))
        self._check_size()
        _ = self.placement

    @property
    def min_replicas(self) -> int:
        """Fewest replicas that the pool keeps alive."""
        return self.num_replicas if isinstance(self.num_replicas, int) else self.num_replicas[0]

    @property
    def max_replicas(self) -> int:
        """Most replicas that the pool keeps alive."""
        return self.num_replicas if isinstance(self.num_replicas, int) else self.num_replicas[1]

    @property
    def num_ranks(self) -> int:
        """Number of ranks of one replica, which are processes."""
        kwargs = self.engine_kwargs
        return int(kwargs.get("tensor_parallel_size", 1)) * int(kwargs.get("pipeline_parallel_size", 1))

    @property
    def placement(self) -> Placement:
        """The resources that Ray reserves for one replica."""
        if self.placement_group_config is not None:
            return Placement.read(self.placement_group_config, self.num_ranks).on(self.accelerator_type)
        resources = {"CPU": self.num_cpus_per_replica, "GPU": self.num_gpus_per_replica}
        return Placement.even(resources, self.num_ranks, self.accelerator_type)

    @property
    def places(self) -> int:
        """Number of requests on board at which a replica is full; the pool grows and shrinks by it."""
        return self.requests_per_replica or self.engine_kwargs.get("max_num_seqs") or DEFAULT_REQUESTS_PER_REPLICA

    def _check_size(self) -> None:
        size = self.num_replicas
        if not isinstance(size, tuple):
            _check_count("num_replicas", size)
            return
        if len(size) != 2 or any(not _is_count(one) for one in size) or size[0] > size[1]:
            raise ConfigError(f"num_replicas must be an integer of at least 1, or (min, max) of them; got {size!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_count(name: str, value: Any) -> None:
    if not _is_count(value):
        raise ConfigError(f"{name} must be an integer of at least 1; got {value!r}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ConfigError(f"{name} must be a number of at least 0; got {value!r}")
