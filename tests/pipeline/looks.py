"""Looks at a pool that is not there: replicas with counters, as `EnginePool.stats` gives them."""

from __future__ import annotations

from millrace.actors import ReplicaStats
from millrace.engine import EngineStats
from millrace.engine.scheduler import SchedulerCounters


def up(
    name: str = "0.0", *, steps: int = 0, out: int = 0, busy_s: float = 0.0, running: int = 0, state: str = "ready"
) -> ReplicaStats:
    """A replica with an engine that has made steps, and twice as many prompt tokens as output tokens."""
    counters = SchedulerCounters(
        num_steps=steps, num_prompt_tokens=2 * out, num_cached_tokens=out // 2, num_output_tokens=out
    )
    engine = EngineStats(running, 0, 0.5 if running else 0.0, busy_s, counters)
    restarts = int(name.partition(".")[2])
    return ReplicaStats(name, state, restarts, (1,), ("node",), {}, engine)  # type: ignore[arg-type]


def absent(state: str, name: str = "0.0") -> ReplicaStats:
    """A replica that is not up."""
    return ReplicaStats(name, state, int(name.partition(".")[2]))  # type: ignore[arg-type]
