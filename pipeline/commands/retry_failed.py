"""`millrace retry-failed DIR`: runs the failed rows of a finished job again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .running import run_shown

if TYPE_CHECKING:
    from ..job.run import PreparedJob


def retry_failed(
    output: Annotated[str, typer.Argument(metavar="DIR", help="Output folder of the job.", show_default=False)],
    *,
    replicas: Annotated[int | None, typer.Option(help="Copies of the model.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per block.")] = None,
    endpoint_url: Annotated[str | None, typer.Option(help="Where s3:// leads, if not to Amazon.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's logs, and tracebacks.")] = False,
) -> None:
    """Run the failed rows of a finished job again. Rows that succeed now join the results."""

    def prepare() -> PreparedJob:
        from ..job.run import prepare_retry

        return prepare_retry(output, endpoint_url, replicas=replicas, batch_size=batch_size)

    run_shown(prepare, verbose=verbose)
