"""Rows into files: durable one by one, published in one go, each once, whatever interrupts it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from millrace import ConfigError
from millrace.pipeline import columns
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.job.folder import JobFolder
from millrace.pipeline.ledger import row_id
from millrace.pipeline.ledger.epoch import Epoch
from millrace.pipeline.ledger.records import read_records
from millrace.pipeline.sinks.manifest import Manifest
from millrace.pipeline.sinks.parts import OutputSpec
from millrace.pipeline.sinks.publish import publish
from millrace.pipeline.sinks.writer import ResultWriter
from millrace.pipeline.sources.base import position_column
from millrace.pipeline.stages.base import Row, RowError

BROKEN = RowError("generate", "NumericalError", "NaN", retryable=True)
SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(Storage.at(tmp_path / "out"))


def spec_of(folder: JobFolder, **changes: Any) -> OutputSpec:
    return OutputSpec(folder.work, **{"schema": SCHEMA, "flush_interval_s": 60.0, **changes})


def ids_of(numbers: list[int]) -> np.ndarray:
    return row_id.from_arrow(position_column(0, numbers))


def write_block(writer: ResultWriter, numbers: list[int], failed: tuple[int, ...] = ()) -> list[int]:
    """Writes a block, and returns which of its rows were new."""
    with writer.block(ids_of(numbers)) as block:
        new = [number for number, is_new in zip(numbers, block.is_new, strict=True) if is_new]
        for number, one in zip(new, block.row_ids, strict=True):
            error = BROKEN if number in failed else None
            row = Row({"n": number}, {"n": number, "text": f"row {number}", "num_generated_tokens": 2}, error)
            writer.append(block, one, row, row)
    return new


def done(folder: JobFolder) -> int:
    """How many rows are durable."""
    return sum(record.num_rows for record in read_records(folder.work, Epoch.open(folder.work).records))


def test_rows_are_durable_when_their_block_is_left(folder: JobFolder) -> None:
    writer = ResultWriter(spec_of(folder), max_blocks=4)
    write_block(writer, [0, 1, 2], failed=(1,))
    assert done(folder) == 3
    assert writer.take_counts().num_failed == 1
    assert writer.take_counts().num_rows == 0


def test_rows_are_durable_after_the_interval_though_their_block_goes_on(folder: JobFolder) -> None:
    writer = ResultWriter(spec_of(folder, flush_interval_s=0.05), max_blocks=4)
    with writer.block(ids_of([0, 1])) as block:
        row = Row({}, {"n": 0, "text": "a"})
        writer.append(block, block.row_ids[0], row, row)
        flushed = Path((folder.work / "results").url)
        wait = Retrying(stop=stop_after_delay(60), wait=wait_fixed(0.02), retry=retry_if_result(lambda x: not x))
        wait(lambda: list(flushed.glob("*.flush")))
        assert done(folder) == 1


def test_a_row_is_written_once(folder: JobFolder) -> None:
    spec = spec_of(folder, max_rows_per_file=4)
    writer = ResultWriter(spec, max_blocks=4)
    assert write_block(writer, [0, 1, 2, 2]) == [0, 1, 2]
    assert write_block(writer, [2, 3, 4, 5]) == [3, 4, 5]
    # As after the death of the process.
    assert write_block(ResultWriter(spec, max_blocks=4), [0, 5, 6]) == [6]
    assert [file.num_rows for file in publish(folder.root, spec).files] == [4, 3]
    assert sorted(pq.read_table(folder.root.url)["n"].to_pylist()) == list(range(7))


def test_many_blocks_write_at_once(folder: JobFolder) -> None:
    spec = spec_of(folder, max_rows_per_file=100)
    writer = ResultWriter(spec, max_blocks=8)
    blocks = [list(range(start, start + 30)) for start in range(0, 900, 25)]  # Neighbours have rows in common.
    with ThreadPoolExecutor(8) as threads:
        written = [
            number for new in threads.map(lambda numbers: write_block(writer, numbers), blocks) for number in new
        ]
    assert sorted(written) == list(range(905))
    manifest = publish(folder.root, spec)
    assert manifest.counts.num_output_tokens == 2 * 905
    assert max(file.num_rows for file in manifest.files) == 100
    assert sorted(pq.read_table(folder.root.url)["n"].to_pylist()) == list(range(905))


def test_an_error_of_writing_is_raised_in_the_waiting_block(folder: JobFolder) -> None:
    writer = ResultWriter(spec_of(folder, max_rows_per_file=2), max_blocks=4)
    write_block(writer, [0])
    Epoch.open(folder.work)
    with pytest.raises(ConfigError, match="another run has begun"):
        write_block(writer, [1])
    with pytest.raises(ConfigError, match="another run has begun"):
        write_block(writer, [2])


def test_a_value_that_fits_no_column_makes_a_dead_letter(folder: JobFolder) -> None:
    spec = spec_of(folder)
    writer = ResultWriter(spec, max_blocks=4)
    with writer.block(ids_of([0, 1])) as block:
        for value, one in zip((1, "many"), block.row_ids, strict=True):
            row = Row({"a": value == 1}, {"n": value, "text": ""})
            writer.append(block, one, row, row)
    manifest = publish(folder.root, spec)
    assert (manifest.num_rows, manifest.num_failed, manifest.total.num_rows) == (1, 1, 2)
    (letter,) = pq.read_table((folder.root / "_failed").url).to_pylist()
    assert (letter["a"], letter["__error_stage"]) == (False, "write")
    assert letter["__error_message"] == "column 'n' holds 'many', which is not int64"


def test_without_a_schema_files_have_the_columns_of_their_rows(folder: JobFolder) -> None:
    spec = spec_of(folder, schema=None)
    writer = ResultWriter(spec, max_blocks=4)
    deep: list[Any] = []
    for _ in range(600):
        deep = [deep]
    values: list[Any] = [1, 2.5, "x", None, object(), "\ud800", 10**20, deep, 2**63 + 5, 2**53 + 1]
    with writer.block(ids_of(list(range(10)))) as block:
        for value, one in zip(values, block.row_ids, strict=True):
            row = Row({"v": str(type(value))}, {"v": value})
            writer.append(block, one, row, row)
    manifest = publish(folder.root, spec)
    assert (manifest.num_rows, manifest.num_failed) == (6, 4)
    read = [pq.read_table((folder.root / one.name).url)["v"].to_pylist() for one in manifest.files]
    assert sorted(map(str, (value for part in read for value in part))) == [
        *("1", "2.5", "9007199254740993", "9223372036854775813", "None", "x")
    ]


def publish_in(folder: JobFolder, kind: str, **changes: Any) -> list[str]:
    """Publishes rows that finished out of order, and returns the files."""
    spec = spec_of(folder, format=kind, max_rows_per_file=4, **changes)
    for numbers in ([7, 0, 9], [3, 8, 1], [2, 6, 5, 4]):
        write_block(ResultWriter(spec, max_blocks=2), numbers)
    return [(folder.root / one.name).url for one in publish(folder.root, spec).files]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "arrow"])
@pytest.mark.parametrize("is_ordered", [False, True])
def test_every_format_can_have_the_order_of_the_input(folder: JobFolder, kind: str, is_ordered: bool) -> None:
    read = {
        "parquet": lambda file: pq.read_table(file).to_pylist(),
        "jsonl": lambda file: [json.loads(line) for line in Path(file).read_text().splitlines()],
        "csv": lambda file: pyarrow.csv.read_csv(file).to_pylist(),
        "arrow": lambda file: pa.ipc.open_file(file).read_all().to_pylist(),
    }[kind]
    rows = [row for file in publish_in(folder, kind, is_ordered=is_ordered) for row in read(file)]
    assert sorted(rows, key=lambda row: row["n"]) == [{"n": n, "text": f"row {n}"} for n in range(10)]
    if is_ordered:
        assert [row["n"] for row in rows] == list(range(10))


def test_lists_in_csv_are_json(folder: JobFolder) -> None:
    spec = spec_of(folder, format="csv", schema=pa.schema([("n", pa.list_(pa.int64()))]))
    writer = ResultWriter(spec, max_blocks=2)
    with writer.block(ids_of([0, 1])) as block:
        for value, one in zip(([1, 2], None), block.row_ids, strict=True):
            writer.append(block, one, Row({}, {"n": value}), Row({}, {}))
    (file,) = publish(folder.root, spec).files
    assert (folder.root / file.name).read_text() == '"n"\n"[1,2]"\n\n'.replace("1,2", "1, 2")


class DiedError(Exception):
    """Stands for a death."""


@pytest.mark.parametrize("at_step", range(1, 8))
def test_publishing_may_be_interrupted_anywhere(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    spec = spec_of(folder, max_rows_per_file=2)
    write_block(ResultWriter(spec, max_blocks=2), [0, 1, 2, 3, 4], failed=(3,))
    steps = iter(range(1, 100))

    def interrupted(name: str) -> Any:
        whole = getattr(Storage, name)

        def step(storage: Storage, *args: Any) -> Any:
            if next(steps) == at_step:
                raise DiedError
            return whole(storage, *args)

        return step

    with monkeypatch.context() as patch:
        for name in ("write_bytes", "move_to"):
            patch.setattr(Storage, name, interrupted(name))
        with pytest.raises(DiedError):
            publish(folder.root, spec)
    assert Manifest.read(folder.root) is None
    manifest = publish(folder.root, spec)
    assert (manifest.num_rows, manifest.num_failed) == (4, 1)
    assert sorted(pq.read_table(folder.root.url)["n"].to_pylist()) == [0, 1, 2, 4]
    assert Manifest.read(folder.root) == manifest
    assert not folder.work.exists()


def test_a_retry_adds_results_and_replaces_dead_letters(folder: JobFolder) -> None:
    spec = spec_of(folder)
    write_block(ResultWriter(spec, max_blocks=2), [0, 1, 2], failed=(1, 2))
    former = publish(folder.root, spec)
    write_block(ResultWriter(spec, max_blocks=2), [1, 2], failed=(2,))
    manifest = publish(folder.root, spec, former)
    assert [one.name for one in manifest.files] == ["part-00000.parquet", "part-00001.parquet"]
    assert [one.name for one in (folder.root / "_failed").list()] == ["part-00001.parquet"]
    assert sorted(pq.read_table(folder.root.url)["n"].to_pylist()) == [0, 1]
    letters = pq.read_table((folder.root / "_failed").url)
    assert letters["n"].to_pylist() == [2]
    assert letters[columns.ERROR_ATTEMPTS].to_pylist() == [1]
    assert (manifest.total.num_rows, manifest.total.num_failed) == (3, 1)
