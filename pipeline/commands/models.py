"""`millrace models`: lists the model families, and what runs for each of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["models"]


def models(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the model families with their architectures, and what runs for each."""
    from ...engine import model_catalog

    entries = model_catalog()
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    for entry in entries:
        console.print(f"[bold]{', '.join(entry.architectures)}[/] ({entry.name}): {entry.layers}")
        console.print("    " + ", ".join(f"{feature}: {how}" for feature, how in entry.runs.items()))
    typer.echo("Every family is tested against transformers; `millrace check MODEL` compares them on your own folder.")
