"""`millrace schema`: prints the JSON schema of job files, for editors."""

from __future__ import annotations

import typer


def schema() -> None:
    """Print the JSON schema of job files."""
    from ..job.schema import schema_text

    typer.echo(schema_text(), nl=False)
