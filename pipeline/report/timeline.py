"""`Timeline`: a run over time, as a limited number of intervals. When the series is full, neighbours are joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

MAX_INTERVALS = 240


@dataclass(frozen=True, slots=True)
class Interval:
    """The amounts and average levels of an interval of a run.

    Attributes:
        end_s: End of the interval, in seconds from the start of the run.
        duration_s: Duration of the interval in seconds.
        num_rows: Rows written in the interval, failed ones included.
        num_failed: Rows with an error written in the interval.
        num_input_tokens: Prompt tokens.
        num_cached_tokens: Prompt tokens found in the KV cache.
        num_output_tokens: Generated tokens.
        num_steps: Steps of all engines.
        num_preemptions: Preemptions.
        step_time_s: Seconds that engines spent in steps.
        num_ready: Replicas that were up, on average.
        num_running: Sequences that held KV cache blocks, on average.
        num_waiting: Sequences that waited for KV cache blocks, on average.
        kv_cache_usage: Share of the KV cache in use, on average over time and replicas.
    """

    end_s: float
    duration_s: float
    num_rows: int = 0
    num_failed: int = 0
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    step_time_s: float = 0.0
    num_ready: float = 0.0
    num_running: float = 0.0
    num_waiting: float = 0.0
    kv_cache_usage: float = 0.0

    def joined(self, later: Interval) -> Interval:
        """Returns one interval for this one and the following one. Amounts are added, and levels averaged over time."""
        duration_s = self.duration_s + later.duration_s
        share = later.duration_s / duration_s if duration_s else 1.0
        levels = {name: getattr(self, name) + (getattr(later, name) - getattr(self, name)) * share for name in LEVELS}
        amounts = {name: getattr(self, name) + getattr(later, name) for name in AMOUNTS}
        return replace(later, duration_s=duration_s, **amounts, **levels)


LEVELS = ("num_ready", "num_running", "num_waiting", "kv_cache_usage")
NAMES = tuple(one.name for one in fields(Interval))
AMOUNTS = tuple(name for name in NAMES if name not in (*LEVELS, "end_s", "duration_s"))


class Timeline:
    """The course of a job as a series of intervals, each with the work done in it and the state of the engines.

    When the series is full, pairs of neighbours are joined to make room (`Interval.joined`).

    Args:
        max_intervals: Most intervals, an even number.
    """

    def __init__(self, max_intervals: int = MAX_INTERVALS) -> None:
        self._max_intervals = max_intervals
        self._shortest_s = 0.0
        self.intervals: list[Interval] = []

    def add(self, interval: Interval, *, tells_of_last: bool = False) -> None:
        """Appends an interval, or joins it to the last interval if that one is shorter than pairs joined earlier.

        Args:
            interval: The next interval.
            tells_of_last: Whether a part of the work in `interval` was done in the last interval, so that both are
                joined.
        """
        if self.intervals and (tells_of_last or self.intervals[-1].duration_s < self._shortest_s):
            self.intervals[-1] = self.intervals[-1].joined(interval)
            return
        if len(self.intervals) >= self._max_intervals:
            pairs = zip(self.intervals[::2], self.intervals[1::2], strict=True)
            self.intervals = [one.joined(other) for one, other in pairs]
            self._shortest_s = min(one.duration_s for one in self.intervals)
        self.intervals.append(interval)

    def as_dict(self) -> dict[str, list[Any]]:
        """Returns the series as plain data for JSON: a list for each attribute of an interval."""
        return {name: [_rounded(getattr(one, name)) for one in self.intervals] for name in NAMES}

    @classmethod
    def from_dict(cls, data: Mapping[str, list[Any]]) -> Timeline:
        """Returns the series whose `as_dict` returned this data."""
        timeline = cls()
        known = [name for name in NAMES if name in data]
        timeline.intervals = [
            Interval(**dict(zip(known, values, strict=True)))
            for values in zip(*(data[name] for name in known), strict=True)
        ]
        return timeline


def _rounded(value: float) -> float:
    return round(value, 4) if isinstance(value, float) else value
