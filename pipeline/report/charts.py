"""Charts as SVG text: steps over time, bars of a histogram, ranges of percentiles. No script, no font, no network.

A colour is a class, and the style of the page gives it a value for light and for dark. The style also shows the numbers
under the pointer. Each chart has a description for readers who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..ledger.histogram import STEPS_PER_DOUBLING, ZERO_BUCKET, Histogram
from .number_text import clock, seconds_text, short

WIDTH, HEIGHT = 480, 132
LEFT, RIGHT, TOP, BOTTOM = 48, 6, 20, 22
WIDE, LABELS, ROW = 980, 120, 30
"""Width of the chart of ranges, width of its labels, and height of a row."""

MAX_BARS = 24


@dataclass(frozen=True, slots=True)
class Step:
    """A constant level over a period, drawn as one step of a chart.

    Attributes:
        start_s: Start of the period, in seconds.
        end_s: End of the period, in seconds.
        value: The level in this period, such as a rate or a number of requests.
    """

    start_s: float
    end_s: float
    value: float


def steps_chart(title: str, steps: Sequence[Step], marks: Sequence[float] = (), kind: str = "out") -> str:
    """Returns a chart of levels over time, as SVG text.

    Args:
        title: Title of the chart.
        steps: The levels, in the order of time, without gaps from second 0 on.
        marks: Times in seconds at which the chart has a vertical line.
        kind: CSS class with the colour of the chart: ``"out"``, ``"in"`` or ``"rows"``.
    """
    top = nice_top(max((step.value for step in steps), default=0.0))
    end_s = max((step.end_s for step in steps), default=1.0) or 1.0
    frame = _Frame(0.0, end_s, top)
    path = "".join(f"V{frame.y(step.value)}H{frame.x(step.end_s)}" for step in steps)
    area = f"M{frame.x(0)} {frame.y(0)}{path}V{frame.y(0)}Z" if steps else ""
    line = f"M{frame.x(0)} {frame.y(steps[0].value)}{path}" if steps else ""
    mean = sum(step.value * (step.end_s - step.start_s) for step in steps) / end_s
    peak = max((step.value for step in steps), default=0.0)
    parts = [
        _levels(frame),
        *(f'<text class="tick" x="{frame.x(at)}" y="{HEIGHT - 6}" {_anchor(at, end_s)}>{clock(at)}</text>'
          for at in time_ticks(end_s)),
        f'<path class="area {kind}" d="{area}"/><path class="line {kind}" d="{line}"/>',
        *(f'<line class="mark" x1="{frame.x(at)}" x2="{frame.x(at)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
          for at in marks),
        *(_bin(frame, step) for step in steps),
    ]  # fmt: skip
    told = f"{title}: {short(mean)} on average, {short(peak)} at most, over {clock(end_s)}."
    return _svg(title, told, HEIGHT, parts)


def bars_chart(title: str, histogram: Histogram, kind: str = "out") -> str:
    """Returns a histogram of token counts as SVG text, with the bars of `coarse_bars`.

    Args:
        title: Title of the chart.
        histogram: Histogram of the tokens of rows.
        kind: CSS class with the colour of the chart, as in `steps_chart`.
    """
    bars = coarse_bars(histogram)
    frame = _Frame(0.0, float(max(1, len(bars))), nice_top(max((count for _, _, count in bars), default=0)))
    every = max(1, math.ceil(len(bars) / 7))
    parts = [_levels(frame)]
    for index, (low, high, count) in enumerate(bars):
        x, y, width = frame.x(index + 0.08), frame.y(count), frame.x(0.84) - frame.x(0)
        first, last = math.ceil(low), max(math.ceil(low), math.ceil(high) - 1)
        span = f"{short(first)} tokens" if first == last else f"{short(first)} to {short(last)} tokens"
        parts.append(
            f'<g class="bin"><rect class="hit" x="{frame.x(index)}" y="{TOP}" width="{frame.x(1) - frame.x(0):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"/><rect class="bar {kind}" x="{x}" y="{y}" width="{width:.1f}" '
            f'height="{frame.y(0) - y:.1f}" rx="1.5"/>{_tip(f"{span}: {count:,} rows")}</g>'
        )
        if index % every == 0:
            parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 6}">{short(first)}</text>')
    told = f"{title}: {histogram.count:,} rows, half of them up to {short(round(histogram.quantile(0.5)))} tokens."
    return _svg(title, told, HEIGHT, parts)


def ranges_chart(title: str, rows: Sequence[tuple[str, Histogram]]) -> str:
    """Returns a chart of median, 90th and 99th percentile of several durations on a logarithmic scale, as SVG text.

    Args:
        title: Title of the chart.
        rows: Label of each row of the chart, and the histogram of its durations in seconds.
    """
    spans = [(label, [times.quantile(share) for share in (0.5, 0.9, 0.99)]) for label, times in rows if times.count]
    low = min((values[0] for _, values in spans), default=0.0)
    high = max((values[-1] for _, values in spans), default=1.0)
    ticks = log_ticks(low, high)
    first, last = math.log10(ticks[0]), math.log10(ticks[-1])
    height = TOP + ROW * max(1, len(spans)) + BOTTOM

    def x(seconds: float) -> float:
        share = (math.log10(max(seconds, ticks[0])) - first) / (last - first)
        return round(LABELS + share * (WIDE - LABELS - 24), 1)

    parts = []
    for tick in ticks:
        at = x(tick)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP - 6}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="tick middle" x="{at}" y="{height - 6}">{seconds_text(tick)}</text>')
    for index, (label, (p50, p90, p99)) in enumerate(spans):
        y = TOP + ROW * index + 12
        parts.append(
            f'<text class="label" x="0" y="{y + 4}">{escape(label)}</text>'
            f'<line class="thin out" x1="{x(p50)}" x2="{x(p99)}" y1="{y}" y2="{y}"/>'
            f'<line class="thick out" x1="{x(p50)}" x2="{x(p90)}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot out" cx="{x(p50)}" cy="{y}" r="5.5"/>'
            f'<line class="end out" x1="{x(p99)}" x2="{x(p99)}" y1="{y - 6}" y2="{y + 6}"/>'
        )
    told = " ".join(
        f"{label}: half within {seconds_text(p50)}, 99 % within {seconds_text(p99)}." for label, (p50, _, p99) in spans
    )
    return _svg(title, told, height, parts, WIDE)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Converts values to SVG coordinates: `x` runs from `first` to `last`, and `y` from 0 to `top`."""

    first: float
    last: float
    top: float

    def x(self, value: float) -> float:
        share = (value - self.first) / (self.last - self.first)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - value / self.top * (HEIGHT - TOP - BOTTOM), 1)


def _svg(title: str, told: str, height: float, parts: Sequence[str], width: float = WIDTH) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _levels(frame: _Frame) -> str:
    parts = []
    for share in (0, 0.5, 1):
        y = frame.y(frame.top * share)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4}">{short(frame.top * share)}</text>')
    return "".join(parts)


def _bin(frame: _Frame, step: Step) -> str:
    x, end = frame.x(step.start_s), frame.x(step.end_s)
    middle = round((x + end) / 2, 1)
    return (
        f'<g class="bin"><rect class="hit" x="{x}" y="{TOP}" width="{end - x:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
        f'<line class="tip cross" x1="{middle}" x2="{middle}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f"{_tip(f'{clock(step.start_s)} to {clock(step.end_s)}: {short(step.value)}')}</g>"
    )


def _tip(text: str) -> str:
    return f'<text class="tip end" x="{WIDTH - RIGHT}" y="12">{escape(text)}</text>'


def _anchor(at: float, end_s: float) -> str:
    return 'text-anchor="end"' if at > 0.97 * end_s else ('text-anchor="start"' if at == 0 else 'text-anchor="middle"')


def coarse_bars(histogram: Histogram, max_bars: int = MAX_BARS) -> list[tuple[float, float, int]]:
    """Joins the buckets of a histogram into fewer bars, and returns (lower end, upper end, count) of each bar.

    The bars are equally wide on a logarithmic scale, and empty bars between others are included.

    Args:
        histogram: The histogram.
        max_bars: Most bars, without the bar of the values that are zero, which comes first if there are any.
    """
    zeros = histogram.buckets.get(ZERO_BUCKET, 0)
    buckets = sorted(bucket for bucket in histogram.buckets if bucket != ZERO_BUCKET)
    bars: list[tuple[float, float, int]] = [(0.0, 0.0, zeros)] if zeros else []
    if not buckets:
        return bars
    width = 1
    while (buckets[-1] // width - buckets[0] // width) + 1 > max_bars:
        width += 1
    for index in range(buckets[0] // width, buckets[-1] // width + 1):
        inside = range(index * width, (index + 1) * width)
        low, high = (2 ** (edge / STEPS_PER_DOUBLING) for edge in (inside.start, inside.stop))
        bars.append((low, high, sum(histogram.buckets.get(bucket, 0) for bucket in inside)))
    return bars


def nice_top(value: float) -> float:
    """Returns a round number, such as 2, 2.5 or 5 times a power of ten, to end an axis from zero that shows `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 2.5, 4, 5, 6, 8, 10) if step * power >= value * 0.999)


def time_ticks(end_s: float) -> list[float]:
    """Returns the labelled seconds of a time axis from zero to `end_s`: zero and at most six round times."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
    step = next((step for step in steps if end_s / step <= 6), math.ceil(end_s / 6 / 86400) * 86400)
    return [float(step * index) for index in range(int(end_s / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns times that divide a logarithmic axis: 1, 2 and 5 times powers of ten, or only powers on a long axis.

    Args:
        low: The least value on the axis.
        high: The greatest value on the axis.

    Returns:
        At least two times. The first is at most `low`, and the last is at least `high`.
    """
    low, high = max(low, 1e-6), max(high, 2e-6)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    begin = max(index for index, tick in enumerate(ticks) if tick <= low * 1.0001)
    end = next((index for index, tick in enumerate(ticks) if tick >= high * 0.9999), len(ticks) - 1)
    return ticks[begin : max(end, begin + 1) + 1]
