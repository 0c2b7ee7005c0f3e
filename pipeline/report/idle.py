"""`IdleClock`: the time of the replicas, busy or idle, with the reason for idle time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tally import Work

REASONS = {
    "loading": "the model was being loaded",
    "starved": "no rows came",
    "backpressured": "the sink held up the rows before",
    "between_steps": "requests were there, and no step ran",
    "draining": "nothing was left to do, or the replica was about to leave",
    "no_replica": "a replica that was asked for was not there",
}
"""Reason why a replica is idle -> its meaning."""

BUSY, UNDECIDED = "busy", "undecided"

ABSENT = ("dead", "unplaced", "failed")
LEAVING = ("draining", "quarantine")
UP = ("ready", *LEAVING)

NO_WORK = Work()


class IdleClock:
    """Adds up the time of all replicas: busy time, and idle time by its reason.

    An engine without requests may wait for rows, or all rows may be done; only later time tells which. The idle time of
    this engine is therefore undecided until a replica runs a step again, and then counts as starved or backpressured.
    Time that is still undecided at the end of the job counts as draining.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys((*REASONS, BUSY, UNDECIDED), 0.0)
        self._last: dict[str, tuple[str, float]] = {}
        self._unseen_s: dict[str, float] = {}
        self._blocked_s = 0.0

    @property
    def busy_s(self) -> float:
        """Seconds that engines spent in steps, added over all replicas."""
        return self._seconds[BUSY]

    @property
    def idle_s(self) -> dict[str, float]:
        """Key of `REASONS` -> idle replica seconds. Undecided time is added to ``"draining"``."""
        idle_s = {reason: self._seconds[reason] for reason in REASONS}
        return idle_s | {"draining": idle_s["draining"] + self._seconds[UNDECIDED]}

    def look(self, replicas: list[Any], gains: Mapping[str, Work], passed_s: float, blocked_s: float) -> None:
        """Divides the time since the previous call into busy and idle time of each replica, and adds up both.

        Args:
            replicas: The `ReplicaStats` of a pool, with the counters of the engines.
            gains: Replica id -> `Work` since the previous call.
            passed_s: Seconds since the previous call.
            blocked_s: Seconds that outputs have waited for the sink so far (`Counts.blocked_s`).
        """
        if any(gain.num_steps for gain in gains.values()):
            self._decide(blocked_s)
        for replica in replicas:
            self._add(replica, gains.get(replica.replica_id, NO_WORK), passed_s)

    def _add(self, replica: Any, gain: Work, passed_s: float) -> None:
        name = replica.replica_id
        if (
            replica.engine is None and replica.state in UP
        ):  # A slow replica has not answered; its next answer covers this time too.
            self._unseen_s[name] = self._unseen_s.get(name, 0.0) + passed_s
            return
        passed_s += self._unseen_s.pop(name, 0.0)
        busy_s = min(passed_s, gain.step_time_s)
        self._take_back(name, gain.step_time_s - busy_s)
        reason = self._reason(replica, name not in self._last)
        self._seconds[BUSY] += busy_s
        self._seconds[reason] += passed_s - busy_s
        if replica.engine is not None:
            self._last[name] = (reason, passed_s - busy_s)

    def _reason(self, replica: Any, is_new: bool) -> str:
        if replica.state in ABSENT:
            return "no_replica"
        if replica.engine is None or is_new:  # Until its first answer, a replica was loading.
            return "loading"
        if replica.state in LEAVING:
            return "draining"
        return "between_steps" if replica.engine.num_running or replica.engine.num_waiting else UNDECIDED

    def _take_back(self, name: str, busy_s: float) -> None:
        """Moves time of a replica from idle to busy, because its counters rose by more seconds than had passed.

        The previous counters were older than their arrival, so a part of the work was done before the previous call.

        Args:
            name: Id of the replica.
            busy_s: Seconds in steps beyond the time since the previous call.
        """
        reason, idle_s = self._last.get(name, (UNDECIDED, 0.0))
        taken_s = min(busy_s, idle_s, self._seconds[reason])
        self._seconds[reason] -= taken_s
        self._seconds[BUSY] += taken_s

    def _decide(self, blocked_s: float) -> None:
        """Counts undecided time as backpressured as long as outputs waited for the sink, and the rest as starved."""
        undecided_s, self._seconds[UNDECIDED] = self._seconds[UNDECIDED], 0.0
        waited_s = min(undecided_s, max(0.0, blocked_s - self._blocked_s))
        self._seconds["backpressured"] += waited_s
        self._seconds["starved"] += undecided_s - waited_s
        self._blocked_s = blocked_s
