"""A job that stopped at a failed row goes on with other settings, and its failed rows run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace import MillraceError
from millrace.pipeline import JobConfig, run_job
from millrace.pipeline.job.run import prepare_retry


@pytest.mark.soak
@pytest.mark.slow
def test_a_job_that_stopped_goes_on_on_two_cpus_and_its_failed_rows_run_again(
    cluster: None, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lines = [f"line {index}" for index in range(40)]
    lines[20] = "z " * 60
    pq.write_table(pa.table({"line": lines}), tmp_path / "in.parquet")
    job = JobConfig(
        model=str(tiny_model("llama")),
        input=str(tmp_path / "in.parquet"),
        output=str(tmp_path / "out"),
        prompt="{line}",
        sampling={"max_tokens": 4},
        engine={"max_model_len": 32, "num_threads": 1},
        batch_size=8,
        flush_interval_s=0.1,
        on_error="stop",
    )
    with pytest.raises(MillraceError, match="PromptTooLongError"):
        run_job(job)
    gone_on = run_job(job.model_copy(update={"on_error": "row"}))
    assert (gone_on.num_rows_out, gone_on.num_rows_failed) == (40, 1)
    again = run_job(prepare_retry(job.output, engine={**job.engine, "max_model_len": 256}))
    assert (again.num_rows_out, again.num_rows_failed) == (40, 0)
    assert sorted(pq.read_table(tmp_path / "out")["line"].to_pylist()) == sorted(lines)
