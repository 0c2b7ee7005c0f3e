"""What engines have done, added up over replicas that come and go: one that starts again counts from zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(slots=True)
class Work:
    """Amounts of an engine's work.

    Attributes:
        num_input_tokens: Prompt tokens taken in.
        num_cached_tokens: Those of them found in the KV cache.
        num_output_tokens: Tokens generated, those of requests that were lost with their replica included.
        num_steps: Steps.
        num_preemptions: Requests whose KV cache was taken away and recomputed.
        step_time_s: Seconds spent in steps.
    """

    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    step_time_s: float = 0.0

    @classmethod
    def of(cls, engine: Any) -> Work:
        """Reads an engine's counters, as `LLMEngine.stats` has them."""
        counters = engine.counters
        return cls(
            counters.num_prompt_tokens,
            counters.num_cached_tokens,
            counters.num_output_tokens,
            counters.num_steps,
            counters.num_preemptions,
            engine.step_time_s,
        )

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Work)))

    def __sub__(self, other: Work) -> Work:
        return Work(*(getattr(self, one.name) - getattr(other, one.name) for one in fields(Work)))

    def as_dict(self) -> dict[str, Any]:
        """Returns the amounts as plain data for JSON."""
        return asdict(self)


class Tally:
    """Adds up the work of all engines of a pool from looks at their counters.

    Attributes:
        total: The work so far.
        num_restarts: Replicas that were started again.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Work] = {}
        self.total = Work()
        self.num_restarts = 0

    def look(self, replicas: list[Any]) -> Mapping[str, Work]:
        """Takes the counters of the replicas as they are now.

        Args:
            replicas: The `ReplicaStats` of a pool. Those without counters are passed over.

        Returns:
            Replica id -> its work since the last look.
        """
        self.num_restarts = max(self.num_restarts, sum(replica.num_restarts for replica in replicas))
        gains = {
            replica.replica_id: self._gain(replica.replica_id, Work.of(replica.engine))
            for replica in replicas
            if replica.engine is not None
        }
        for gain in gains.values():
            self.total += gain
        return gains

    def _gain(self, replica_id: str, now: Work) -> Work:
        """Returns what is new; counters that went back are those of an engine that began anew."""
        before = self._seen.get(replica_id, Work())
        self._seen[replica_id] = now
        return now if now.num_steps < before.num_steps else now - before
