"""`millrace plan JOB.yaml`: the forecast of a job, before any engine starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...engine.errors import ConfigError

GIB = 1 << 30


def plan(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Job file.")],
    *,
    set_fields: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Field of the job; may be repeated.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to look at, spread over the input.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of their draw.")] = 0,
    memory: Annotated[
        float | None, typer.Option(min=0.001, metavar="GIB", help="Memory of an accelerator elsewhere, in GiB.")
    ] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="Tokens that a replica generates in a second, if you know.")
    ] = None,
    report: Annotated[
        str | None, typer.Option(metavar="REPORT.json", help="Report of an earlier job, to take the throughput from.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run an engine here for a moment to see the throughput.")
    ] = False,
    within: Annotated[str | None, typer.Option(help="Time the job may take, such as 90m: how many replicas?")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks.")] = False,
) -> None:
    """Say what a job will take: lengths, rows that do not fit, KV room, replicas, time and price."""
    from ..forecast.run import forecast_job
    from ..forecast.throughput import Throughput
    from ..forecast.view import show
    from ..job.file import load_job
    from ..session import quiet_stderr

    if sum((tokens_per_s is not None, report is not None, measure)) > 1:
        raise ConfigError("--tokens-per-s, --report and --measure exclude each other: each says how fast a replica is")
    with quiet_stderr(verbose=verbose):
        forecast = forecast_job(
            load_job(job_file, settings=set_fields or []),
            sample_size=rows,
            seed=seed,
            memory_bytes=None if memory is None else int(memory * GIB),
            within_s=None if within is None else read_duration(within),
            throughput=None if tokens_per_s is None else Throughput.told(tokens_per_s),
            report=report,
            measure=measure,
        )
    if as_json:
        typer.echo(json.dumps(forecast.as_dict(), indent=2, ensure_ascii=False))
    else:
        show(forecast, Console(soft_wrap=True, highlight=False))


def read_duration(text: str) -> float:
    """Reads a time such as ``"45s"``, ``"90m"`` or ``"2h"``.

    Args:
        text: A number and one of s, m, h.

    Returns:
        Seconds.

    Raises:
        ConfigError: The text is no such time.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        raise ConfigError(f"--within must be a number and one of s, m, h, such as 90m; got {text!r}") from None
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--within must be more than nothing; got {text!r}")
    return seconds
