"""Where the time of the replicas went: busy, or idle and why."""

from __future__ import annotations

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
"""Why a replica does nothing."""

ABSENT = ("dead", "unplaced", "failed")
LEAVING = ("draining", "quarantine")


class IdleClock:
    """Adds up the seconds of all replicas.

    Whether an engine without requests is starved or done shows only later: its time is held back until a replica works
    again, and what is held back at the end was the end.

    Attributes:
        busy_s: Replica seconds in steps.
        idle_s: Reason -> replica seconds.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.idle_s = dict.fromkeys(REASONS, 0.0)
        self._held_back_s = 0.0
        self._blocked_s = 0.0
        self._unseen_s: dict[str, float] = {}

    def look(self, replicas: list[Any], gains: Any, passed_s: float, blocked_s: float) -> None:
        """Takes the time since the last look.

        Args:
            replicas: The `ReplicaStats` of a pool.
            gains: Replica id -> `Work` since the last look.
            passed_s: Seconds since the last look.
            blocked_s: Seconds that outputs have waited for the sink so far.
        """
        if any(gain.num_steps for gain in gains.values()):
            self._settle(blocked_s)
        for replica in replicas:
            self._add(replica, gains.get(replica.replica_id, Work()), passed_s)

    def finish(self) -> None:
        """Takes the end of the run: what was held back was waiting for it."""
        self.idle_s["draining"] += self._held_back_s
        self._held_back_s = 0.0

    def _add(self, replica: Any, gain: Work, passed_s: float) -> None:
        if replica.state in ABSENT:
            self.idle_s["no_replica"] += passed_s
        elif replica.state == "starting":
            self.idle_s["loading"] += passed_s
        elif replica.engine is None:  # It did not answer in time; the next answer tells of this while too.
            self._unseen_s[replica.replica_id] = self._unseen_s.get(replica.replica_id, 0.0) + passed_s
        else:
            self._add_up(replica, gain, passed_s + self._unseen_s.pop(replica.replica_id, 0.0))

    def _add_up(self, replica: Any, gain: Work, passed_s: float) -> None:
        busy_s = min(passed_s, gain.step_time_s)
        idle_s = passed_s - busy_s
        self.busy_s += busy_s
        if replica.state in LEAVING:
            self.idle_s["draining"] += idle_s
        elif replica.engine.num_running or replica.engine.num_waiting:
            self.idle_s["between_steps"] += idle_s
        else:
            self._held_back_s += idle_s

    def _settle(self, blocked_s: float) -> None:
        """Says why engines had nothing to do before the work that has come now."""
        waited_s = min(self._held_back_s, max(0.0, blocked_s - self._blocked_s))
        self.idle_s["backpressured"] += waited_s
        self.idle_s["starved"] += self._held_back_s - waited_s
        self._held_back_s, self._blocked_s = 0.0, blocked_s
