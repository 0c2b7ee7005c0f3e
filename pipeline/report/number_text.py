"""Numbers and times as text for people."""

from __future__ import annotations


def short(value: float) -> str:
    """Returns a number as a short text, such as 950, 1.2k or 3.4M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (limit if suffix != 'k' else 1e3):.3g}{suffix}"
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """Returns a duration as text: ``"4:05"`` for minutes and seconds, ``"1:04:05"`` from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds_text(seconds: float) -> str:
    """Returns a duration as text: in µs, ms or s, and as in `clock` from two minutes on."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else clock(seconds)
