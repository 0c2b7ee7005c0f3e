"""`millrace retry-failed DIR`: runs the failed rows of a finished job again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .running import BatchSize, EndpointUrl, OutputFolder, Replicas, TakeOver, Verbose, run_shown

if TYPE_CHECKING:
    from ..job.run import PreparedJob


def retry_failed(
    output: OutputFolder,
    *,
    replicas: Replicas = None,
    batch_size: BatchSize = None,
    endpoint_url: EndpointUrl = None,
    take_over: TakeOver = False,
    verbose: Verbose = False,
) -> None:
    """Run the failed rows of a finished job again. Rows that succeed now are added to the results."""

    def prepare() -> PreparedJob:
        from ..job.run import prepare_retry

        return prepare_retry(output, endpoint_url, take_over=take_over, replicas=replicas, batch_size=batch_size)

    run_shown(prepare, verbose=verbose)
