"""Prints the JSON lines of the benchmarks as plain tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_CELL = 80
"""Most characters of a cell, because messages can be long."""

COLUMNS = {
    "kernels": ("op", "case", "us", "library_us", "GB_per_s", "TFLOP_per_s", "share_of_limit", "failed"),
    "offline": (
        "engine", "model", "quantization", "kv_cache_dtype", "deterministic", "enforce_eager", "workload", "seconds",
        "output_tok_per_s", "total_tok_per_s", "ideal_s", "share_of_limit", "skipped", "withheld",
    ),
    "startup": ("model", "state", "imports_s", "engine_s", "first_step_s", "first_token_s"),
    "suite": ("command", "failed"),
    "check_kernels": ("op", "case", "dtype", "error", "failed"),
    "attention_sweep": ("case", "variant", "us", "GB_per_s", "TFLOP_per_s", "share_of_limit", "failed", "skipped"),
    "steps": ("step", "result", "seconds", "follows", "last_line"),
}  # fmt: skip
"""The columns in the table of each benchmark; others have those of all their lines. The file has all fields."""

COMMON = ("benchmark", "step")


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a plain table per benchmark, in the order of the lines."""
    parts = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        own = [row for row in rows if row["benchmark"] == benchmark]
        named = COLUMNS.get(benchmark, tuple(dict.fromkeys(name for row in own for name in row if name not in COMMON)))
        columns = [name for name in named if any(row.get(name) for row in own)]
        cells = [columns, *([_cell(row.get(name)) for name in columns] for row in own)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        parts += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)]
    return "\n".join(parts)


def _cell(value: Any) -> str:
    return "" if value is None or value is False else str(value).partition("\n")[0][:MAX_CELL]
