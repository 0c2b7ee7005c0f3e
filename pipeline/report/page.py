"""`report.html`: the report as a page for people, in one file that needs nothing else.

It is made from the dict that `report.json` is, and holds it, so the two cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ..ledger.histogram import Histogram
from .charts import Step, bars_chart, clock, ranges_chart, short, steps_chart
from .idle import REASONS

TEMPLATE = "page.html"
MAX_STEPS = 90
GUST_S, MIN_ROW_STEPS = 10.0, 6
"""Rows are written in gusts, so a step of the chart of rows is as long, unless the whole job is short."""

SERIES = (
    ("Output tokens a second", "num_output_tokens", "out"),
    ("Prompt tokens a second", "num_input_tokens", "in"),
    ("Rows written a second", "num_rows", "rows"),
)
"""What is shown over time as a rate: title, figure, colour."""

LEVELS = (
    ("Requests running", "num_running", "out"),
    ("Requests waiting", "num_waiting", "in"),
    ("KV cache in use, %", "kv_cache_usage", "rows"),
)
"""What is shown over time as a level."""

TIMES = (("Queue", "queue_s"), ("First token", "ttft_s"), ("Whole request", "e2e_s"))


def render(report: Mapping[str, Any]) -> str:
    """Returns the page.

    Args:
        report: As `Report.as_dict` gives it.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(short=short, clock=clock)
    return environment.get_template(TEMPLATE).render(
        report=report,
        data=as_script(report),
        summary=report["summary"],
        over_time=list(_over_time(report)),
        prompt_bars=bars_chart("Prompt tokens of a row", _histogram(report, "input_tokens"), "in"),
        output_bars=bars_chart("Output tokens of a row", _histogram(report, "output_tokens"), "out"),
        ranges=ranges_chart("Latency", [(label, _histogram(report, name)) for label, name in TIMES]),
        times=TIMES,
        shares=list(shares(report["replicas"])),
    )


def as_script(report: Mapping[str, Any]) -> str:
    """Returns JSON that may stand inside a `script` element, whatever the texts in it hold."""
    return json.dumps(report, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


@dataclass(frozen=True, slots=True)
class Share:
    """Where a part of the replicas' time went.

    Attributes:
        name: Busy, or the reason for idleness.
        meaning: The same in words.
        seconds: Replica seconds.
        share: Of all, from 0 to 1.
    """

    name: str
    meaning: str
    seconds: float
    share: float


def shares(replicas: Mapping[str, Any]) -> Iterator[Share]:
    """Yields the parts of the replicas' time that are not nought, busy first."""
    parts = [("busy", "in steps of the engine", replicas["busy_s"])]
    parts += [(name, meaning, replicas["idle_s"].get(name, 0.0)) for name, meaning in REASONS.items()]
    total = sum(seconds for _, _, seconds in parts)
    for name, meaning, seconds in parts:
        if seconds > 0:
            yield Share(name, meaning, seconds, seconds / total)


def _histogram(report: Mapping[str, Any], name: str) -> Histogram:
    return Histogram.from_dict(report["counts"][name])


def _over_time(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields title and chart of what is shown over time."""
    row_steps = max(MIN_ROW_STEPS, int(report["seconds"] / GUST_S))
    for title, name, kind in SERIES:
        max_steps = min(MAX_STEPS, row_steps) if name == "num_rows" else MAX_STEPS
        yield title, _chart(report, title, kind, _coarse(_pieces(report, name), max_steps))
    for title, name, kind in LEVELS:
        factor = 100.0 if name == "kv_cache_usage" else 1.0
        amounts = [
            (start_s, end_s, factor * level * (end_s - start_s)) for start_s, end_s, level in _pieces(report, name)
        ]
        yield title, _chart(report, title, kind, _coarse(amounts, MAX_STEPS))


def _chart(report: Mapping[str, Any], title: str, kind: str, amounts: Iterable[tuple[float, float, float]]) -> str:
    """Draws amounts of whiles as their rates; of a level times its while that is the mean level."""
    steps = [Step(start_s, end_s, amount / (end_s - start_s)) for start_s, end_s, amount in amounts if end_s > start_s]
    return steps_chart(title, steps, _marks(report), kind)


def _pieces(report: Mapping[str, Any], name: str) -> list[tuple[float, float, float]]:
    """Returns start, end and figure of every interval; the runs follow each other without their pauses."""
    pieces, offset_s = [], 0.0
    for run in report["runs"]:
        timeline = run["timeline"]
        for end_s, duration_s, value in zip(timeline["end_s"], timeline["duration_s"], timeline[name], strict=True):
            pieces.append((offset_s + end_s - duration_s, offset_s + end_s, value))
        offset_s += run["seconds"]
    return pieces


def _coarse(pieces: Sequence[tuple[float, float, float]], max_steps: int) -> Iterator[tuple[float, float, float]]:
    """Joins neighbours until there are few enough to look at; amounts add up."""
    size = -(-len(pieces) // max_steps)
    for index in range(0, len(pieces), max(1, size)):
        group = pieces[index : index + size]
        yield group[0][0], group[-1][1], sum(amount for _, _, amount in group)


def _marks(report: Mapping[str, Any]) -> list[float]:
    """Returns where on the axis of time a job was taken up again."""
    ends, passed_s = [], 0.0
    for run in report["runs"][:-1]:
        passed_s += run["seconds"]
        ends.append(passed_s)
    return ends
