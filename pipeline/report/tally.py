"""`Tally`: the work of all engines together. Replicas come and go, and a restarted replica counts from zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(slots=True)
class Work:
    """An amount of work that engines have done.

    Attributes:
        num_input_tokens: Prompt tokens.
        num_cached_tokens: Prompt tokens found in the KV cache.
        num_output_tokens: Generated tokens, including the tokens of requests that died with their replica.
        num_steps: Steps.
        num_preemptions: Preemptions, in which a request lost its KV cache and recomputed it later.
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
        """Returns the work that an engine has done since its start, from its `EngineStats`."""
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
    """Adds up the work of all engines of a pool from their counters, which the caller passes to `look` repeatedly.

    Attributes:
        total: The work of all engines up to the last `look`.
        num_restarts: Number of restarts of replicas.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Work] = {}
        self.total = Work()
        self.num_restarts = 0

    def look(self, replicas: list[Any]) -> Mapping[str, Work]:
        """Reads the counters of the replicas, and adds their work since the previous call to `total`.

        Args:
            replicas: The `ReplicaStats` of a pool. Replicas without counters are skipped.

        Returns:
            Replica id -> its work since the previous call.
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
        """Returns the work of a replica since the previous call, or all its work if its counters restarted at zero."""
        before = self._seen.get(replica_id, Work())
        self._seen[replica_id] = now
        return now if now.num_steps < before.num_steps else now - before
