"""`Run`: one run of a job, from the start of its replicas to its end or death. A resumed job has several runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .tally import Work
from .timeline import Timeline


@dataclass(slots=True)
class Run:
    """The record of a run. The record of a run that was killed ends at the last call of `Recorder.look`.

    Attributes:
        started_at: Start of the run, in ISO 8601 with the time zone.
        seconds: Duration of the run.
        start_up_s: Seconds until the first replica had loaded the model.
        generate_s: Seconds from the end of the start-up until the last token.
        write_s: Seconds from the last token until the end of the run, in which the last files are written.
        busy_s: Replica seconds in steps.
        idle_s: Key of `REASONS` -> replica seconds without work.
        held_s: Replica seconds in which replicas held resources of the cluster.
        accelerator_s: Kind of accelerator -> accelerator seconds held; empty on CPUs.
        num_restarts: Number of restarts of replicas.
        work: Work of all engines in the run.
        timeline: Rows, tokens and levels of the run over time.
    """

    started_at: str
    seconds: float = 0.0
    start_up_s: float = 0.0
    generate_s: float = 0.0
    write_s: float = 0.0
    busy_s: float = 0.0
    idle_s: dict[str, float] = field(default_factory=dict)
    held_s: float = 0.0
    accelerator_s: dict[str, float] = field(default_factory=dict)
    num_restarts: int = 0
    work: Work = field(default_factory=Work)
    timeline: Timeline = field(default_factory=Timeline)

    def as_dict(self) -> dict[str, Any]:
        """Returns the run as plain data for JSON."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("work", "timeline")}
        plain["idle_s"] = {reason: round(seconds, 3) for reason, seconds in self.idle_s.items()}
        plain["accelerator_s"] = {kind: round(seconds, 3) for kind, seconds in self.accelerator_s.items()}
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in plain.items()}
        return {**rounded, "work": self.work.as_dict(), "timeline": self.timeline.as_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Run:
        """Returns the run whose `as_dict` returned this data."""
        known = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        known["work"] = Work(**data["work"])
        known["timeline"] = Timeline.from_dict(data["timeline"])
        return cls(**known)
