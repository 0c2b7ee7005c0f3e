"""The command line, `millrace`. Each command is a file in `commands/`.

Exit status: 0 if every row succeeded, 1 if the job failed, 2 if an argument or setting is wrong, 3 if some rows failed,
130 if Ctrl-C stopped the job, 143 if SIGTERM did, 129 if SIGHUP did.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .._version import __version__
from .commands.batch import batch
from .commands.check import check
from .commands.embed import embed
from .commands.init import init
from .commands.models import models
from .commands.plan import plan
from .commands.quantize import quantize
from .commands.resume import resume
from .commands.retry_failed import retry_failed
from .commands.run import run
from .commands.running import explained
from .commands.schema import schema
from .commands.stopping import stop_on_signals

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run large language models over datasets.",
)


def main() -> None:
    """Runs the command line. A signal that comes before a job begins ends the process with its status as well."""
    with stop_on_signals() as stopping:
        try:
            app()
        except SystemExit as ended:
            if not stopping.has_come:
                raise
            typer.echo("stopped", err=True)
            os._exit(stopping.status(ended))


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"millrace {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Takes the options that come before the name of a command."""


app.command()(run)
app.command()(embed)
app.command()(batch)
app.command()(resume)
app.command("retry-failed")(retry_failed)
for _command in (plan, init, schema, models, check, quantize):
    app.command()(explained(_command))


if __name__ == "__main__":
    main()
