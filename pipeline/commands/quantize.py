"""`millrace quantize MODEL OUT`: writes a quantised copy of a model folder, and says what that has cost."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ...engine.errors import ConfigError
from ..plain_text import without_controls
from .running import EngineSettings, engine_setting

if TYPE_CHECKING:
    from ...engine import QuantizationReport

__all__ = ["quantize", "read_column"]

COLUMNS = ("messages", "text", "prompt")
"""Columns that are looked for in a file of rows, in this order."""

MAX_ROWS = 640
"""Most rows that are read."""


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or name on a hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    *,
    scheme: Annotated[str, typer.Option(help="w4a16, w8a16, w8a8 or fp8.")] = "w4a16",
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale: 128, 64 or 32 (w4a16).")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Groups have zero points.")] = False,
    head: Annotated[
        int | None, typer.Option(help="Bits of the output head, 4 or 8; it is left alone by default.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Rows of text or messages (Parquet, JSON lines, ...): round for these, and measure."
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the rows; messages, text or prompt is found without it.")
    ] = None,
    engine: EngineSettings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks.")] = False,
) -> None:
    """Write a quantised copy of a model folder, in the format of compressed-tensors: weights of 4 or 8 bits."""
    from ...engine import quantize_model

    given = dict(map(engine_setting, engine or []))
    if "model" in given:
        raise ConfigError("the model is the argument MODEL; leave it out of --engine")
    if column is not None and calibration is None:
        raise ConfigError("--column is a column of the rows of --calibration, which is missing")
    options: dict[str, Any] = {
        "scheme": scheme,
        "group_size": group_size,
        "symmetric": not asymmetric,
        "head_bits": head,
    }
    rows = [] if calibration is None else read_column(calibration, column)
    report = quantize_model(model, out, **options, rows=rows, **given)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        _show(report, out)


def read_column(path: str, column: str | None) -> list[Any]:
    """Returns the values of one column of a file of rows, as many as a calibration uses, without those that are null.

    Args:
        path: Path or URL of the file.
        column: Name of the column; None for the first of `COLUMNS` that the file has.

    Raises:
        ConfigError: The file cannot be read, or has no such column, or nothing in it.
    """
    from ..arrow_values import to_rows
    from ..sources import Source

    source = Source.find(path)
    name = column or next((name for name in COLUMNS if name in source.schema.names), None)
    if name is None or name not in source.schema.names:
        raise ConfigError(
            f"--calibration {path!r} has no column {name or ' or '.join(COLUMNS)!r}; pass --column, one of "
            f"{', '.join(source.schema.names)}"
        )
    source = source.with_columns([name])
    tables = itertools.chain.from_iterable(source.tables(unit) for unit in source.units)
    rows = itertools.chain.from_iterable(to_rows(table, source.schema) for table in tables)
    found = list(itertools.islice((row[name] for row in rows if row[name] is not None), MAX_ROWS))
    if not found:
        raise ConfigError(f"--calibration {path!r} has no rows, or only null ones, in column {name!r}")
    return found


def _show(report: QuantizationReport, out: Path) -> None:
    """Prints a report as a short table."""
    console = Console(soft_wrap=True, highlight=False)
    share = report.bytes_after / report.bytes_before
    console.print(f"{'folder':<12}{escape(without_controls(str(out)))}")
    how = "for the calibration rows (GPTQ)" if report.method == "gptq" else "to the nearest numbers"
    console.print(f"{'layers':<12}{report.num_layers} in {report.scheme}, rounded {how}")
    sizes = [f"{num_bytes / 2**20:,.0f} MiB" for num_bytes in (report.bytes_before, report.bytes_after)]
    console.print(f"{'tensors':<12}{sizes[0]} before, {sizes[1]} after ({share:.0%})")
    if report.perplexity_before is None:
        console.print(f"{'perplexity':<12}not computed, because there are no --calibration rows")
    else:
        console.print(
            f"{'perplexity':<12}{report.perplexity_before:.4g} before, {report.perplexity_after:.4g} after, on "
            f"{report.num_evaluation_tokens} tokens that were not used to round"
        )
    for name, error in report.worst[:3]:
        console.print(f"{'error':<12}{error:.2%} of {escape(without_controls(name))}")
    for reason, names in report.declined.items():
        console.print(f"[yellow]{len(names)} layers stay as they are, because they {escape(reason)}[/]")
