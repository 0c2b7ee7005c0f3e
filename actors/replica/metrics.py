"""The metrics of a replica: a table of them, and `Meter`, which reads and publishes them.

`ray.util.metrics` exports them under names ``millrace_...`` with the tags ``pool`` and ``replica``; `EnginePool.stats`
returns them as data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from ray.util.metrics import Gauge

TAGS = ("pool", "replica")


@runtime_checkable
class EngineStats(Protocol):
    """Protocol of the engine statistics that the metrics are computed from, as in `millrace.engine.EngineStats`."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    step_time_s: float
    counters: Any


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a replica.

    Attributes:
        description: The quantity and its unit.
        read: Function that computes a value from the statistics of the engine.
        is_rate: Whether the metric is the growth per second of the value that `read` computes, not the value itself.
    """

    description: str
    read: Callable[[EngineStats], float]
    is_rate: bool = False


def _cache_hit_rate(stats: EngineStats) -> float:
    counters = stats.counters
    return counters.num_cached_tokens / max(1, counters.num_prompt_tokens)


def _step_time_s(stats: EngineStats) -> float:
    return stats.step_time_s / max(1, stats.counters.num_steps)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "num_running": Metric("Requests that hold KV cache", lambda stats: stats.num_running),
        "num_waiting": Metric("Requests that wait for KV cache", lambda stats: stats.num_waiting),
        "kv_cache_usage": Metric("Share of the KV cache blocks in use, 0 to 1", lambda stats: stats.kv_cache_usage),
        "cache_hit_rate": Metric("Share of prompt tokens found in the prefix cache, 0 to 1", _cache_hit_rate),
        "num_preemptions": Metric("Preemptions since the start", lambda stats: stats.counters.num_preemptions),
        "step_time_s": Metric("Mean seconds of a step", _step_time_s),
        "prompt_tokens_per_s": Metric(
            "Prompt tokens per second", lambda stats: stats.counters.num_prompt_tokens, is_rate=True
        ),
        "output_tokens_per_s": Metric(
            "Generated tokens per second", lambda stats: stats.counters.num_output_tokens, is_rate=True
        ),
    }
)
"""All metrics by name. A rate is an average over the seconds since the last publication."""


class Meter:
    """Computes the metrics of one replica from the engine's statistics, and publishes them through Ray.

    Args:
        pool_name: Value of the tag ``pool``.
        replica_id: Value of the tag ``replica``.
        clock: Function that returns the seconds of a steady clock.
    """

    def __init__(self, pool_name: str, replica_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._tags = dict(zip(TAGS, (pool_name, replica_id), strict=True))
        self._clock = clock
        self._gauges: dict[str, Gauge] = {}
        self._counts: dict[str, float] = {}
        self._rates: dict[str, float] = {}
        self._counted_at_s = clock()

    def read(self, stats: Any) -> dict[str, float]:
        """Returns the metrics of the replica.

        Args:
            stats: Statistics of the engine. Of a value that is no `EngineStats` there are no metrics.

        Returns:
            Name of the metric in `METRICS` -> value. Rates are those of the latest `publish`, 0 before it.
        """
        if not isinstance(stats, EngineStats):
            return {}
        return {
            name: self._rates.get(name, 0.0) if metric.is_rate else float(metric.read(stats))
            for name, metric in METRICS.items()
        }

    def publish(self, stats: Any) -> None:
        """Computes the rates since the last call, and sets all metrics as gauges of `ray.util.metrics`.

        Args:
            stats: As for `read`.
        """
        if isinstance(stats, EngineStats):
            self._count(stats)
        for name, figure in self.read(stats).items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"millrace_{name}", METRICS[name].description, TAGS)
            self._gauges[name].set(figure, self._tags)

    def _count(self, stats: EngineStats) -> None:
        now_s = self._clock()
        passed_s = max(1e-9, now_s - self._counted_at_s)
        for name, metric in METRICS.items():
            if metric.is_rate:
                count = metric.read(stats)
                self._rates[name] = (count - self._counts.get(name, 0.0)) / passed_s
                self._counts[name] = count
        self._counted_at_s = now_s
