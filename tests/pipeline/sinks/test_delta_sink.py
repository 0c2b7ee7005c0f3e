"""Delta tables as output: one version for each job, whatever dies, and the old ones kept."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from millrace import ConfigError, write_results
from millrace.engine.errors import StorageError
from millrace.pipeline import JobConfig, columns
from millrace.pipeline.job.run import PreparedJob, prepare_job, prepare_resume, prepare_retry
from millrace.pipeline.ledger import row_id
from millrace.pipeline.sinks.formats import FORMATS, delta
from millrace.pipeline.sinks.manifest import Manifest
from millrace.pipeline.sinks.publish import PLAN, RETRY, publish
from millrace.pipeline.sinks.writer import ResultWriter
from millrace.pipeline.sources.base import position_column
from millrace.pipeline.stages.base import Row, RowError
from s3 import CREDENTIALS, S3Server

deltalake = pytest.importorskip("deltalake")

REPORTED = {"finish_reason": "stop", "num_input_tokens": 1, "num_cached_tokens": 0, "num_generated_tokens": 1}
LOCAL: dict[str, str] = {}


@pytest.fixture
def job(tmp_path: Path, model_folder: Path) -> JobConfig:
    """A job whose output is a table."""
    moment = dt.datetime(2026, 1, 1, 12)
    rows = {"id": range(6), "line": list("abcdef"), "at": pa.array([moment] * 6, pa.timestamp("ns"))}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet")
    places = {"input": str(tmp_path / "in.parquet"), "output": str(tmp_path / "out")}
    return JobConfig(model=str(model_folder), prompt="{line}", output_format="delta", max_rows_per_file=2, **places)


def begin(prepared: PreparedJob) -> None:
    """Leaves in the folder what a job leaves that begins."""
    if prepared.former is not None:
        (prepared.folder.work / RETRY).write_bytes(b"{}")
    elif not prepared.resumes:
        prepared.folder.clear(prepared.state.publisher)
        prepared.folder.write_state(prepared.state)


def write(prepared: PreparedJob, rows: list[int], failed: list[int]) -> None:
    """Makes rows durable in the work folder, as the process that generates does."""
    writer = ResultWriter(prepared.spec, max_blocks=1)
    ids = row_id.from_arrow(position_column(0, [*rows, *failed]))
    with writer.block(ids) as block:
        for one, known in zip([*rows, *failed], row_id.as_bytes(ids), strict=True):
            values = {"id": one, "line": "abcdef"[one], "at": dt.datetime(2026, 1, 1, 12)}
            error = RowError("engine", "NumericalError", "NaN") if one in failed else None
            row = Row(values, {**values, "generated_text": f"{one}!", **REPORTED}, error)
            writer.append(block, known, row, row)


def run(prepared: PreparedJob, rows: list[int], failed: list[int] | None = None) -> Manifest:
    begin(prepared)
    write(prepared, rows, failed or [])
    return publish(prepared.folder.root, prepared.spec, prepared.former)


def texts(output: str, version: int | None = None, options: dict[str, str] = LOCAL) -> dict[int, str]:
    rows = deltalake.DeltaTable(output, version=version, storage_options=options).to_pyarrow_table().to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["generated_text"] for row in rows}


def versions(output: str) -> int:
    """How many versions a table has."""
    return len(deltalake.DeltaTable(output).history())


def expect(*rows: int) -> dict[int, str]:
    return {one: f"{one}!" for one in rows}


def test_columns_that_a_table_cannot_hold_together_are_refused_before_the_start() -> None:
    with pytest.raises(ConfigError, match=r"cannot have these columns together: .*'a'; choose others with columns"):
        FORMATS["delta"].fit_schema(pa.schema([("A", pa.int64()), ("a", pa.int64())]))


@pytest.mark.parametrize("order", ["any", "input"])
def test_a_job_is_one_version_of_a_table(job: JobConfig, order: str) -> None:
    prepared = prepare_job(job.model_copy(update={"order": order}))
    begin(prepared)
    write(prepared, [5, 0, 1], [])
    write(prepared, [4, 2], [3])
    assert not (Path(job.output) / "_delta_log").exists()
    manifest = publish(prepared.folder.root, prepared.spec)
    assert (texts(job.output), versions(job.output)) == (expect(0, 1, 2, 4, 5), 1)
    assert (manifest.table_version, manifest.num_rows, manifest.num_failed, len(manifest.files)) == (0, 5, 1, 3)
    assert Manifest.read(prepared.folder.root) == manifest
    table = deltalake.DeltaTable(job.output)
    assert {Path(one).name for one in table.file_uris()} == {one.name for one in manifest.files}
    assert pa.schema(table.schema().to_arrow()) == prepared.spec.schema
    assert pa.table(table.get_add_actions())["num_records"].to_pylist() == [one.num_rows for one in manifest.files]
    (letter,) = pq.read_table(Path(job.output) / "_failed").to_pylist()
    assert (letter["id"], letter["__error_kind"]) == (3, "NumericalError")


def test_rows_that_run_again_are_added_in_a_version_of_their_own(job: JobConfig) -> None:
    run(prepare_job(job), [0, 1, 2], [3, 4, 5])
    manifest = run(prepare_retry(job.output), [4, 5], [3])
    assert (manifest.table_version, manifest.num_rows, manifest.num_failed) == (1, 5, 1)
    assert (texts(job.output), versions(job.output)) == (expect(0, 1, 2, 4, 5), 2)
    assert texts(job.output, version=0) == expect(0, 1, 2)
    manifest = run(prepare_retry(job.output), [3])
    assert (manifest.table_version, manifest.num_failed, texts(job.output)) == (2, 0, expect(*range(6)))


def test_a_finished_job_is_replaced_in_one_version_and_its_old_version_stays(job: JobConfig) -> None:
    run(prepare_job(job), [0, 1, 2], [3])
    with pytest.raises(ConfigError, match="a finished job; pass --overwrite"):
        prepare_job(job)
    prepared = prepare_job(job.model_copy(update={"columns": ["id"], "seed": 7}), overwrite=True)
    begin(prepared)
    write(prepared, [4, 5], [])
    assert texts(job.output) == expect(0, 1, 2)  # Until the end readers see the old one.
    assert publish(prepared.folder.root, prepared.spec).table_version == 1
    assert (texts(job.output), versions(job.output)) == (expect(4, 5), 2)
    assert "at" not in deltalake.DeltaTable(job.output).to_pyarrow_table().column_names
    assert texts(job.output, version=0) == expect(0, 1, 2)
    run(prepare_job(job, overwrite=True), [1])  # A column comes back whose type is a feature of tables.
    assert (texts(job.output), texts(job.output, version=1)) == (expect(1), expect(4, 5))


def test_a_table_gives_way_to_files_and_files_to_a_table(job: JobConfig) -> None:
    plain = job.model_copy(update={"output_format": "parquet"})
    run(prepare_job(job), [0, 1])
    assert run(prepare_job(plain, overwrite=True), [2]).table_version is None
    assert pq.read_table(job.output)["id"].to_pylist() == [2]
    assert not (Path(job.output) / "_delta_log").exists()
    assert run(prepare_job(job, overwrite=True), [3]).table_version == 0
    assert len(list(Path(job.output).glob("*.parquet"))) == 1


def test_a_table_that_no_job_of_ours_made_is_left_alone(job: JobConfig) -> None:
    deltalake.write_deltalake(job.output, pa.table({"id": [1]}))
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"already holds '_delta_log'; pass another folder"):
            prepare_job(job, overwrite=overwrite)
    assert deltalake.DeltaTable(job.output).version() == 0


def test_a_table_is_still_ours_after_a_death_during_its_replacement(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(prepare_job(job), [0, 1])
    prepared = prepare_job(job.model_copy(update={"seed": 1}), overwrite=True)
    prepared.folder.clear(prepared.state.publisher)  # And no more.
    assert texts(job.output) == expect(0, 1)
    assert run(prepare_job(job.model_copy(update={"seed": 1}), overwrite=True), [2]).table_version == 1


@pytest.mark.parametrize("is_made", [False, True], ids=["before the commit", "after the commit"])
@pytest.mark.parametrize("retries", [False, True])
def test_a_death_around_the_commit_leaves_one_version(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch, is_made: bool, retries: bool
) -> None:
    prepared, rows = prepare_job(job), [0, 1, 2]
    if retries:
        run(prepared, [0], [1, 2])
        prepared, rows = prepare_retry(job.output), [1, 2]
    real = delta.commit

    def die(*arguments: Any) -> int:
        if is_made:
            real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(delta, "commit", die)
        with pytest.raises(KeyboardInterrupt):
            run(prepared, rows)
    assert (Path(prepared.folder.work.url) / PLAN).exists()
    if is_made:  # Another writer comes in between.
        late = deltalake.DeltaTable(job.output).to_pyarrow_table().slice(0, 1)
        late = late.set_column(0, "id", pa.array([77]))
        deltalake.write_deltalake(job.output, late, mode="append")
    again = prepare_resume(job.output)
    manifest = publish(again.folder.root, again.spec, again.former)
    assert manifest.table_version == int(retries)
    assert {one: text for one, text in texts(job.output).items() if one != 77} == expect(0, 1, 2)
    assert versions(job.output) == 1 + retries + is_made
    assert not Path(again.folder.work.url).exists()


def test_a_commit_that_fails_leaves_the_job_to_go_on(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Path(job.output) / "_delta_log"
    prepared = prepare_job(job)
    begin(prepared)
    write(prepared, [0, 1], [])
    log.write_text("a file where the log should be")
    with pytest.raises(StorageError, match="cannot commit to the Delta table") as caught:
        publish(prepared.folder.root, prepared.spec)
    assert "\n" not in str(caught.value)
    log.unlink()
    again = prepare_resume(job.output)
    assert publish(again.folder.root, again.spec).num_rows == 2
    assert texts(job.output) == expect(0, 1)


def test_a_job_without_results_makes_an_empty_table(job: JobConfig) -> None:
    manifest = run(prepare_job(job), [], [0, 1])
    assert (manifest.table_version, manifest.num_rows, texts(job.output)) == (0, 0, {})
    assert run(prepare_retry(job.output), [0, 1]).table_version == 1
    assert texts(job.output) == expect(0, 1)


def test_types_that_a_table_does_not_have_become_wider() -> None:
    kinds = {
        "a": (pa.uint8(), pa.int16()), "b": (pa.uint64(), pa.decimal128(20, 0)), "c": (pa.null(), pa.string()),
        "d": (pa.timestamp("ns"), pa.timestamp("us")), "f": (pa.float16(), pa.float32()),
        "e": (pa.timestamp("s", "Europe/Berlin"), pa.timestamp("us", "UTC")), "g": (pa.large_string(), pa.string()),
        "h": (pa.dictionary(pa.int32(), pa.string()), pa.string()), "i": (pa.date64(), pa.date32()),
    }  # fmt: skip
    given = pa.schema([pa.field(name, kind, pa.types.is_null(kind)) for name, (kind, _) in kinds.items()])
    assert FORMATS["delta"].fit_schema(given) == pa.schema([(name, kind) for name, (_, kind) in kinds.items()])


@pytest.mark.parametrize("kind", [pa.time64("us"), pa.duration("s"), pa.list_(pa.time64("us"))])
def test_a_type_that_no_table_has_raises_an_error_before_the_start(
    job: JobConfig, tmp_path: Path, kind: pa.DataType
) -> None:
    pq.write_table(pa.table({"line": ["a"], "odd": pa.array([None], kind)}), tmp_path / "in.parquet")
    with pytest.raises(ConfigError, match=r"column 'odd' is .*, which output_format has no type for; leave it out"):
        prepare_job(job)
    prepare_job(job.model_copy(update={"columns": ["line"]}))


def test_a_dataset_is_not_written_as_a_table(tmp_path: Path) -> None:
    class Rows:
        def columns(self) -> list[str]:
            return [columns.POSITION]

    with pytest.raises(ConfigError, match="output_format 'delta' is for jobs"):
        write_results(None, Rows(), str(tmp_path / "out"), output_format="delta")  # type: ignore[arg-type]


def test_a_table_in_a_bucket(job: JobConfig, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    options = {"AWS_ENDPOINT_URL": s3.url, "AWS_ALLOW_HTTP": "true"}
    url = f"s3://{s3.make_bucket()}/out"
    prepared = prepare_job(job.model_copy(update={"output": url, "endpoint_url": s3.url}))
    run(prepared, [0, 1, 2], [3])
    retry = prepare_retry(url, s3.url)
    assert run(retry, [3]).table_version == 1
    assert texts(url, options=options) == expect(0, 1, 2, 3)
    assert json.loads((prepared.folder.root / "_manifest.json").read_bytes())["table_version"] == 1


@pytest.mark.soak
def test_a_killed_job_goes_on_from_table_to_table(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    table, out = str(tmp_path / "table"), tmp_path / "out"
    days = [dt.date(2026, 1, 1 + index % 3) for index in range(300)]
    rows = pa.table({"id": range(300), "line": [f"line {index}" for index in range(300)], "day": days})
    deltalake.write_deltalake(table, rows, partition_by=["day"])
    deltalake.DeltaTable(table).delete("id < 10")
    command = [sys.executable, "-P", "-c", "from millrace.pipeline.cli import main; main()"]
    arguments = ["run", "--model", str(tiny_model("llama")), "--input", table, "--output", str(out)]
    settings = ["engine.max_num_seqs=32", "engine.max_model_len=128", "engine.num_threads=1", "flush_interval_s=0.2"]
    sets = [word for one in settings for word in ("--set", one)]
    more = ["--prompt", "{day} {line}", "--max-tokens", "64", "--batch-size", "16", "--output-format", "delta"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, *arguments, *more, *sets], **quiet, start_new_session=True) as process:
        waiting = Retrying(stop=stop_after_delay(120), wait=wait_fixed(0.05), retry=retry_if_result(lambda x: not x))
        waiting(lambda: list((out / "_millrace" / "work" / "results").glob("*.flush")))
        process.kill()
    assert not (out / "_delta_log").exists()
    deltalake.write_deltalake(table, rows.slice(0, 10), mode="append")
    deltalake.DeltaTable(table).delete("id > 200")
    done = subprocess.run([*command, "resume", str(out)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "going on with the job" in done.stderr
    read = deltalake.DeltaTable(str(out)).to_pyarrow_table().sort_by("id")
    assert read.select(["id", "line", "day"]) == rows.slice(10)
    assert (versions(str(out)), json.loads((out / "_manifest.json").read_text())["table_version"]) == (1, 0)
