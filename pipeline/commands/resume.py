"""`millrace resume DIR`: resumes an unfinished job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .running import BatchSize, EndpointUrl, OutputFolder, Replicas, TakeOver, Verbose, run_shown

if TYPE_CHECKING:
    from ..job.run import PreparedJob


def resume(
    output: OutputFolder,
    *,
    replicas: Replicas = None,
    batch_size: BatchSize = None,
    endpoint_url: EndpointUrl = None,
    take_over: TakeOver = False,
    verbose: Verbose = False,
) -> None:
    """Resume a job that was interrupted. Finished rows do not run again."""

    def prepare() -> PreparedJob:
        from ..job.run import prepare_resume

        return prepare_resume(output, endpoint_url, take_over=take_over, replicas=replicas, batch_size=batch_size)

    run_shown(prepare, verbose=verbose)
