"""`Recorder`: makes the record of a run from the states of its pool and the counts that a caller passes repeatedly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ..ledger.counts import Counts
from .idle import ABSENT, NO_WORK, IdleClock
from .run import Run
from .tally import Tally, Work
from .timeline import Interval, Timeline

LATE = 1.5

RATE_WINDOW_S = 10.0
"""Seconds over which current rates are taken."""


class Recorder:
    """Makes the record of a run (`Run`) from the replicas and counts that the caller passes to `look` repeatedly.

    Args:
        started_s: Start of the run, on the same clock as `now_s` of `look`.
        accelerator_of: Function from the id of a Ray node to its kind of accelerator; None if the node has none.
        max_intervals: Most intervals of the timeline of the run; None for the default of `Timeline`.

    Attributes:
        ready_s: Time of the first `look` that found a replica up; None before that.
        last_token_s: Time of the last `look` that found new output tokens; None before the first.
        rows_before: Rows that earlier runs had written, taken from the counts at the first `look`; None before that.
    """

    def __init__(
        self,
        started_s: float,
        accelerator_of: Callable[[str], str | None] = lambda node_id: None,
        max_intervals: int | None = None,
    ) -> None:
        self._started_s = self._looked_s = started_s
        self._accelerator_of = accelerator_of
        self._timeline = Timeline() if max_intervals is None else Timeline(max_intervals)
        self._tally, self._idle = Tally(), IdleClock()
        self._run = Run(datetime.now(UTC).isoformat(timespec="seconds"))
        self._held_s: dict[str, float] = {}
        self._kinds: dict[str, list[str]] = {}
        self._counted = (0, 0)
        self._recent: deque[tuple[float, Work]] = deque()
        self.ready_s: float | None = None
        self.last_token_s: float | None = None
        self.rows_before: int | None = None

    def look(self, replicas: list[Any], counts: Counts, now_s: float) -> Interval:
        """Adds the state of the replicas and the new rows to the record of the run.

        Args:
            replicas: The `ReplicaStats` of the pool, with the counters of the engines.
            counts: Counts of the rows written so far.
            now_s: Time of the call, on the same clock as `started_s`.

        Returns:
            The interval between the previous call and this one.
        """
        passed_s, self._looked_s = max(0.0, now_s - self._looked_s), now_s
        gains = self._tally.look(replicas)
        work = sum(gains.values(), NO_WORK)
        engines = [replica.engine for replica in replicas if replica.engine is not None]
        if engines and self.ready_s is None:
            self.ready_s = now_s
        if work.num_output_tokens:
            self.last_token_s = now_s
        self._idle.look(replicas, gains, passed_s, counts.blocked_s)
        self._hold(replicas, passed_s)
        interval = Interval(
            end_s=now_s - self._started_s,
            duration_s=passed_s,
            **self._new_rows(counts),
            **work.as_dict(),
            num_ready=len(engines),
            num_running=sum(engine.num_running for engine in engines),
            num_waiting=sum(engine.num_waiting for engine in engines),
            kv_cache_usage=sum(engine.kv_cache_usage for engine in engines) / max(1, len(engines)),
        )
        # The work exceeds the time, so a part of the work was done before the previous call.
        is_late = any(gain.step_time_s > LATE * passed_s for gain in gains.values())
        self._timeline.add(interval, tells_of_last=is_late)
        self._recent.append((now_s, self._tally.total))
        while now_s - self._recent[0][0] > RATE_WINDOW_S:
            self._recent.popleft()
        return interval

    def rates(self) -> tuple[float, float]:
        """Returns prompt and output tokens per second over the last `RATE_WINDOW_S`."""
        if len(self._recent) < 2:
            return 0.0, 0.0
        (then_s, then), (now_s, now) = self._recent[0], self._recent[-1]
        new, passed_s = now - then, max(1e-9, now_s - then_s)
        return new.num_input_tokens / passed_s, new.num_output_tokens / passed_s

    @property
    def cache_hit_rate(self) -> float:
        """Share, from 0 to 1, of the prompt tokens of the run that were found in the KV cache."""
        total = self._tally.total
        return total.num_cached_tokens / max(1, total.num_input_tokens)

    @property
    def num_restarts(self) -> int:
        """Number of restarts of replicas in the run."""
        return self._tally.num_restarts

    def record(self, now_s: float) -> Run:
        """Returns the record of the run until `now_s`: one object, which every call updates."""
        run = self._run
        ready_s = now_s if self.ready_s is None else self.ready_s
        last_token_s = min(now_s, max(ready_s, self.last_token_s or now_s))
        run.seconds, run.start_up_s = now_s - self._started_s, ready_s - self._started_s
        run.generate_s, run.write_s = last_token_s - ready_s, now_s - last_token_s
        run.held_s, run.accelerator_s = sum(self._held_s.values()), self._accelerator_seconds()
        run.busy_s, run.idle_s = self._idle.busy_s, self._idle.idle_s
        run.num_restarts, run.work, run.timeline = self._tally.num_restarts, self._tally.total, self._timeline
        return run

    def finish(self, replicas: list[Any], counts: Counts, now_s: float) -> Run:
        """Calls `look` a last time, and returns the record of the whole run.

        Args:
            replicas: `ReplicaStats` of each replica of the pool at the end of the run.
            counts: Counts of all rows written.
            now_s: Time of the end of the run.
        """
        self.look(replicas, counts, now_s)
        return self.record(now_s)

    def _new_rows(self, counts: Counts) -> dict[str, int]:
        if self.rows_before is None:
            self.rows_before, self._counted = counts.num_rows, (counts.num_rows, counts.num_failed)
        before, self._counted = self._counted, (counts.num_rows, counts.num_failed)
        return {"num_rows": counts.num_rows - before[0], "num_failed": counts.num_failed - before[1]}

    def _hold(self, replicas: list[Any], passed_s: float) -> None:
        """Adds `passed_s` to the held time of each placed replica, and notes the accelerators of its nodes."""
        for replica in replicas:
            if replica.state not in ABSENT:
                self._held_s[replica.replica_id] = self._held_s.get(replica.replica_id, 0.0) + passed_s
            if replica.node_ids and replica.replica_id not in self._kinds:
                kinds = [self._accelerator_of(node_id) for node_id in replica.node_ids]
                self._kinds[replica.replica_id] = [kind for kind in kinds if kind is not None]

    def _accelerator_seconds(self) -> dict[str, float]:
        """Returns accelerator kind -> seconds held; a replica that never ran counts under the kinds of another one."""
        usual = next(iter(self._kinds.values()), [])
        seconds: dict[str, float] = {}
        for replica_id, held_s in self._held_s.items():
            for kind in self._kinds.get(replica_id, usual):
                seconds[kind] = seconds.get(kind, 0.0) + held_s
        return seconds
