"""`report.html`: the report as a page for people, in one file without links to others.

The page is made from the same dict as `report.json` and holds it, so the two cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ..ledger.histogram import Histogram
from .charts import Step, bars_chart, ranges_chart, steps_chart
from .idle import REASONS
from .number_text import clock, short

TEMPLATE = "page.html"
MAX_STEPS = 90
GUST_S, MIN_ROW_STEPS = 10.0, 6
"""Seconds of a step in the chart of rows, which are written in bursts; and the least number of steps of a chart."""

SERIES = (
    ("Output tokens a second", "num_output_tokens", "out"),
    ("Prompt tokens a second", "num_input_tokens", "in"),
    ("Rows written a second", "num_rows", "rows"),
)
"""Charts of rates over time: title, number, colour."""

LEVELS = (
    ("Requests running", "num_running", "out"),
    ("Requests waiting", "num_waiting", "in"),
    ("KV cache in use, %", "kv_cache_usage", "rows"),
)
"""Charts of levels over time: title, number, colour."""

MAX_ADAPTERS = 100
"""Most adapters that the page lists."""

TIMES = (("Queue", "queue_s"), ("First token", "ttft_s"), ("Whole request", "e2e_s"))


def render(report: Mapping[str, Any]) -> str:
    """Returns the HTML page of a report.

    Args:
        report: The dict that `Report.as_dict` returns.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    adapters = _adapters(report)
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
        adapters=adapters[:MAX_ADAPTERS],
        num_more_adapters=len(adapters[MAX_ADAPTERS:]),
    )


def as_script(report: Mapping[str, Any]) -> str:
    """Returns the report as JSON that is safe inside a `script` element, whatever its texts hold."""
    return json.dumps(report, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


@dataclass(frozen=True, slots=True)
class Share:
    """The part of the replicas' time that was busy, or idle for one reason.

    Attributes:
        name: ``"busy"``, or a key of `REASONS`.
        meaning: Description of the part, for people.
        seconds: Replica seconds of the part.
        share: Share of all replica seconds, from 0 to 1.
    """

    name: str
    meaning: str
    seconds: float
    share: float


def shares(replicas: Mapping[str, Any]) -> Iterator[Share]:
    """Yields the parts of the replicas' time that are not 0, busy time first, from `replicas` of `Report.as_dict`."""
    parts = [("busy", "in steps of the engine", replicas["busy_s"])]
    parts += [(name, meaning, replicas["idle_s"].get(name, 0.0)) for name, meaning in REASONS.items()]
    total = sum(seconds for _, _, seconds in parts)
    for name, meaning, seconds in parts:
        if seconds > 0:
            yield Share(name, meaning, seconds, seconds / total)


def _adapters(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, int]]]:
    """Returns name and rows of each adapter, the one with the most rows first; the first entry is the model itself."""
    counts = report["counts"]
    named = sorted(counts["adapters"].items(), key=lambda item: (-item[1]["num_rows"], item[0]))
    if not named:
        return []
    total = {**counts, "num_rows": counts["num_rows"] - counts["num_failed"]}
    names = ("num_rows", "num_input_tokens", "num_output_tokens")
    plain = {name: total[name] - sum(rows[name] for _, rows in named) for name in names}
    return [("none: the model itself", plain), *named]


def _histogram(report: Mapping[str, Any], name: str) -> Histogram:
    return Histogram.from_dict(report["counts"][name])


def _over_time(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (title, chart) of each metric of the report that is drawn over time; charts are SVG text."""
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
    """Returns a chart of steps over time, as SVG text, from tuples (start in seconds, end in seconds, amount).

    The height of a step is its amount divided by its duration: a rate, or a mean level.
    """
    steps = [Step(start_s, end_s, amount / (end_s - start_s)) for start_s, end_s, amount in amounts if end_s > start_s]
    return steps_chart(title, steps, _marks(report), kind)


def _pieces(report: Mapping[str, Any], name: str) -> list[tuple[float, float, float]]:
    """Returns (start in seconds, end in seconds, value of the field `name`) of the intervals of all runs' timelines.

    Each run starts at the time at which the one before it ended, so pauses between runs are left out.
    """
    pieces, offset_s = [], 0.0
    for run in report["runs"]:
        timeline = run["timeline"]
        for end_s, duration_s, value in zip(timeline["end_s"], timeline["duration_s"], timeline[name], strict=True):
            pieces.append((offset_s + end_s - duration_s, offset_s + end_s, value))
        offset_s += run["seconds"]
    return pieces


def _coarse(pieces: Sequence[tuple[float, float, float]], max_steps: int) -> Iterator[tuple[float, float, float]]:
    """Joins neighbouring intervals into at most `max_steps` longer ones.

    An interval is a tuple (start in seconds, end in seconds, amount); the amounts of joined intervals are added.
    """
    size = -(-len(pieces) // max_steps)
    for index in range(0, len(pieces), max(1, size)):
        group = pieces[index : index + size]
        yield group[0][0], group[-1][1], sum(amount for _, _, amount in group)


def _marks(report: Mapping[str, Any]) -> list[float]:
    """Returns the times in seconds, counted as in `_pieces`, at which a run ended and the next one began."""
    ends, passed_s = [], 0.0
    for run in report["runs"][:-1]:
        passed_s += run["seconds"]
        ends.append(passed_s)
    return ends
