"""`millrace plan JOB.yaml`: shows the forecast of a job, before any engine starts."""

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
    rows: Annotated[int, typer.Option(min=1, help="Rows to sample, spread over the input.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    memory: Annotated[
        float | None, typer.Option(min=0.001, metavar="GIB", help="Memory of an accelerator elsewhere, in GiB.")
    ] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="Tokens per second of a replica, if you know them.")
    ] = None,
    report: Annotated[
        str | None, typer.Option(metavar="REPORT.json", help="Report of an earlier job, to take the throughput from.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the throughput with a short run on this machine.")
    ] = False,
    within: Annotated[
        str | None, typer.Option(help="Time that the job may take, such as 90m; shows the replicas needed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks.")] = False,
) -> None:
    """Forecast a job: prompt lengths, rows that do not fit, KV cache, replicas, time and price."""
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
    """Returns the seconds of a duration such as ``"45s"``, ``"90m"`` or ``"2h"``.

    Args:
        text: A number and the unit s, m or h.

    Raises:
        ConfigError: The text is not a duration of this form, or is not positive.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        raise ConfigError(f"--within must be a number and one of s, m, h, such as 90m; got {text!r}") from None
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--within must be greater than zero; got {text!r}")
    return seconds
