"""Rows into files: durable one by one, published in one go, each once, whatever interrupts it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from millrace import ConfigError
from millrace.engine.errors import DamagedOutputError, OutputInUseError
from millrace.pipeline import columns
from millrace.pipeline.arrow_values import python_values
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.job.folder import JobFolder
from millrace.pipeline.job.writing import Done
from millrace.pipeline.ledger import row_id
from millrace.pipeline.ledger.claim import Claim
from millrace.pipeline.ledger.epoch import Epoch
from millrace.pipeline.ledger.records import read_records
from millrace.pipeline.sinks.formats import FORMATS
from millrace.pipeline.sinks.manifest import Manifest
from millrace.pipeline.sinks.parts import OutputSpec
from millrace.pipeline.sinks.publish import PLAN, Expected, publish
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
    values: list[Any] = [1, 2.5, "x", None, object(), "\ud800", 10**20, deep, 2**63 + 5, 2**53 + 1, {}]
    with writer.block(ids_of(list(range(11)))) as block:
        for value, one in zip(values, block.row_ids, strict=True):
            row = Row({"v": str(type(value))}, {"v": value})
            writer.append(block, one, row, row)
    manifest = publish(folder.root, spec)
    assert (manifest.num_rows, manifest.num_failed) == (7, 4)
    read = [pq.read_table((folder.root / one.name).url)["v"].to_pylist() for one in manifest.files]
    assert sorted(map(str, (value for part in read for value in part))) == [
        *("1", "2.5", "9007199254740993", "9223372036854775813", "None", "x", "{}")
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


def test_ordered_rows_of_types_that_do_not_go_together_are_text(folder: JobFolder) -> None:
    spec = spec_of(folder, schema=None, is_ordered=True)
    writer = ResultWriter(spec, max_blocks=4)
    values: list[Any] = [2**53 + 1, "x", 1.5, None, {"a": 1}]
    with writer.block(ids_of(list(range(5)))) as block:
        for value, one in zip(values, block.row_ids, strict=True):
            row = Row({}, {"v": value, "n": 1})
            writer.append(block, one, row, row)
    (file,) = publish(folder.root, spec).files
    table = pq.read_table((folder.root / file.name).url)
    assert table["v"].to_pylist() == ["9007199254740993", "x", "1.5", None, '{"a": 1}']
    assert table["n"].to_pylist() == [1] * 5


def test_lists_in_csv_are_json(folder: JobFolder) -> None:
    spec = spec_of(folder, format="csv", schema=pa.schema([("n", pa.list_(pa.int64()))]))
    writer = ResultWriter(spec, max_blocks=2)
    with writer.block(ids_of([0, 1])) as block:
        for value, one in zip(([1, 2], None), block.row_ids, strict=True):
            writer.append(block, one, Row({}, {"n": value}), Row({}, {}))
    (file,) = publish(folder.root, spec).files
    assert (folder.root / file.name).read_text() == '"n"\n"[1,2]"\n\n'.replace("1,2", "1, 2")


HARD = {
    "empty": pa.array([{}, None]),
    "nested empty": pa.array([[{"a": {}}], None]),
    "view": pa.array(["a", None], pa.string_view()),
    "runs": pa.array([1, None], pa.run_end_encoded(pa.int32(), pa.int64())),
    "uuid": pa.array([b"x" * 16, None], pa.uuid()),
    "bytes": pa.array([b"\xff", None]),
    "fixed bytes": pa.array([b"\xff\xfe", None], pa.binary(2)),
    "json": pa.array(["[1]", None], pa.json_()),
    "unsigned": pa.array([2**63 + 5, None], pa.uint64()),
    "numbers": pa.array([float("nan"), float("inf")]),
    "map": pa.array([[(1, 2)], None], pa.map_(pa.int64(), pa.int64())),
    "categories": pa.array(["a", None]).dictionary_encode(),
    "none": pa.nulls(2),
    "bad text": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers()),
    "far": pa.array([253_402_300_800_000_000], pa.timestamp("us")),
    "seconds": pa.array([[5], None], pa.list_(pa.timestamp("s"))),
    "time": pa.array([5, None], pa.time32("s")),
    "thousands": pa.array([Decimal(5000), None], pa.decimal128(5, -3)),
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "arrow"])
@pytest.mark.parametrize("name", HARD)
def test_every_type_is_written_in_every_format(folder: JobFolder, kind: str, name: str) -> None:
    column = HARD[name]
    schema = FORMATS[kind].fit_schema(pa.schema([("x", column.type), *SCHEMA]))
    spec = spec_of(folder, format=kind, schema=schema)
    writer = ResultWriter(spec, max_blocks=2)
    with writer.block(ids_of(list(range(len(column))))) as block:
        for value, one in zip(python_values(pa.chunked_array([column])), block.row_ids, strict=True):
            row = Row({}, {"x": value, "n": 1, "text": "a"})
            writer.append(block, one, row, row)
    manifest = publish(folder.root, spec)
    assert (manifest.num_rows, manifest.num_failed) == (len(column), 0)
    if kind == "jsonl":
        text = (folder.root / manifest.files[0].name).read_text()
        first, *_ = [json.loads(line, parse_constant=pytest.fail)["x"] for line in text.splitlines()]
        known = {
            "empty": {},
            "numbers": None,
            "bytes": "/w==",
            "bad text": "\\xff",
            "far": "10000-01-01 00:00:00.000000",
        }
        assert first == known.get(name, first)


@pytest.mark.parametrize("input_schema", [None, pa.schema([("x", pa.timestamp("ms"))])])
def test_a_value_that_a_format_does_not_store_costs_its_row(folder: JobFolder, input_schema: pa.Schema | None) -> None:
    column = pa.array([5, 2**60], pa.timestamp("s"))
    schema = FORMATS["parquet"].fit_schema(pa.schema([("x", column.type)]))
    writer = ResultWriter(spec_of(folder, schema=schema, input_schema=input_schema), max_blocks=2)
    with writer.block(ids_of([0, 1])) as block:
        for value, one in zip(python_values(pa.chunked_array([column])), block.row_ids, strict=True):
            row = Row({"x": value}, {"x": value})
            writer.append(block, one, row, row)
    manifest = publish(folder.root, spec_of(folder, schema=schema))
    assert (manifest.num_rows, manifest.num_failed) == (1, 1)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "arrow"])
def test_a_type_that_no_table_is_made_of_is_refused_before_the_start(kind: str) -> None:
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]).type
    with pytest.raises(ConfigError, match="column 'x' is sparse_union"):
        FORMATS[kind].fit_schema(pa.schema([("x", union)]))


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


def work_files(folder: JobFolder, suffix: str) -> list[Path]:
    return [Path(one.url) for one in (folder.work / "results").list(suffix)]


DAMAGES = {
    "deleted": lambda data: None,
    "emptied": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "cut to a half": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"x",
    "a bit flipped": lambda data: data[:40] + bytes([data[40] ^ 4]) + data[41:],
    "a bit flipped at the end": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".parquet", ".ids", ".flush"])
@pytest.mark.parametrize("is_ordered", [False, True])
def test_a_damaged_file_is_refused_with_its_name(folder: JobFolder, suffix: str, damage: str, is_ordered: bool) -> None:
    spec = spec_of(folder, max_rows_per_file=4, is_ordered=is_ordered)
    write_block(ResultWriter(spec, max_blocks=2), [0, 1, 2, 3])
    write_block(ResultWriter(spec, max_blocks=2), [4, 5])
    file = work_files(folder, suffix)[0]
    data = DAMAGES[damage](file.read_bytes())
    file.unlink() if data is None else file.write_bytes(data)
    # Without its record, nothing says that a row is done, so it is found missing.
    said = "6 rows went into output .* have finished" if data is None and suffix != ".parquet" else file.name
    with pytest.raises(DamagedOutputError, match=said):
        publish(folder.root, spec, expected=Expected(6, is_exact=True))
    assert not folder.is_finished
    file.unlink(missing_ok=True)
    file.with_suffix(".ids").unlink(missing_ok=True)
    write_block(ResultWriter(spec, max_blocks=2), list(range(6)))  # As a run that resumes.
    assert publish(folder.root, spec, expected=Expected(6, is_exact=True)).num_rows == 6
    assert sorted(pq.read_table(folder.root.url)["n"].to_pylist()) == list(range(6))


def test_a_part_that_is_missing_is_found_before_the_rows_run(folder: JobFolder) -> None:
    write_block(ResultWriter(spec_of(folder, max_rows_per_file=2), max_blocks=2), [0, 1])
    (part,) = work_files(folder, ".parquet")
    part.write_bytes(b"")
    with pytest.raises(DamagedOutputError, match=f"{part.name}.*0 bytes"):
        Done.find(folder.work)
    part.unlink()
    with pytest.raises(DamagedOutputError, match=f"{part.name}.*is missing"):
        Done.find(folder.work)


def test_no_manifest_is_written_for_rows_that_are_missing_or_too_many(folder: JobFolder) -> None:
    spec = spec_of(folder)
    write_block(ResultWriter(spec, max_blocks=2), [0, 1, 2])
    for expected in (Expected(4), Expected(4, is_exact=True), Expected(2, is_exact=True)):
        with pytest.raises(DamagedOutputError, match=f"{expected.num_rows} rows went into .* and 3 have finished"):
            publish(folder.root, spec, expected=expected)
        assert not folder.is_publishing
    assert publish(folder.root, spec, expected=Expected(2)).num_rows == 3


def test_no_manifest_is_written_for_a_row_that_is_there_twice(folder: JobFolder) -> None:
    spec = spec_of(folder, max_rows_per_file=2)
    write_block(ResultWriter(spec, max_blocks=2), [0, 1])
    (commit,) = work_files(folder, ".ids")
    commit.with_name(commit.name.replace("000001.ids", "000009.ids")).write_bytes(commit.read_bytes())
    with pytest.raises(DamagedOutputError, match="2 rows are twice"):
        publish(folder.root, spec)


def interrupt_before_moving(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> tuple[OutputSpec, Path]:
    """Leaves a publication with its plan written and nothing moved."""
    spec = spec_of(folder)
    write_block(ResultWriter(spec, max_blocks=2), [0, 1, 2], failed=(2,))

    def die(*args: Any) -> None:
        raise DiedError

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "move_to", die)
        with pytest.raises(DiedError):
            publish(folder.root, spec)
    return spec, Path((folder.work / PLAN).url)


@pytest.mark.parametrize(
    "outside", ["../../x", "/x", "a/../../../x", "..", "s3://bucket/x", "_failed/../../x", 7, None]
)
@pytest.mark.parametrize("field", ["part", "name", "removed", "files", "failed_files"])
def test_a_plan_that_names_a_file_outside_the_output_touches_nothing(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, field: str, outside: Any
) -> None:
    spec, file = interrupt_before_moving(folder, monkeypatch)
    mine = Path(folder.root.url).parent / "x"
    mine.write_bytes(b"mine")
    plan = json.loads(file.read_bytes())
    del plan["checksum"]
    if field in ("part", "name"):
        plan["moves"][0][("part", "name").index(field)] = outside
    elif field == "removed":
        plan["removed"] = [outside]
    if field in ("name", "files"):
        plan["manifest"]["files"][0]["name"] = outside
    if field == "failed_files":
        plan["manifest"]["failed_files"][0]["name"] = outside
    file.write_text(json.dumps(plan))
    before = {one: one.read_bytes() for one in Path(folder.root.url).rglob("*") if one.is_file()}
    with pytest.raises(DamagedOutputError):
        publish(folder.root, spec)
    assert mine.read_bytes() == b"mine"
    assert {one: one.read_bytes() for one in Path(folder.root.url).rglob("*") if one.is_file()} == before


def test_a_link_that_leads_out_of_the_output_is_not_followed(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = interrupt_before_moving(folder, monkeypatch)
    elsewhere = Path(folder.root.url).parent / "elsewhere"
    elsewhere.mkdir()
    (Path(folder.root.url) / "_failed").symlink_to(elsewhere)
    with pytest.raises(DamagedOutputError, match="not inside"):
        publish(folder.root, spec)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["../x.parquet", "/etc/passwd", ""])
def test_a_manifest_that_names_a_file_outside_the_output_is_refused(folder: JobFolder, name: str) -> None:
    plain = Manifest().as_dict() | {"failed_files": [{"name": name, "num_rows": 1, "num_bytes": 1}]}
    (folder.root / "_manifest.json").write_bytes(json.dumps(plain).encode())
    with pytest.raises(DamagedOutputError, match="not inside that folder"):
        Manifest.read(folder.root)


ODD_MANIFESTS = [
    {"files": None},
    {"files": [{"name": 5, "num_rows": 1, "num_bytes": 1}]},
    {"files": [{"name": "a", "num_rows": "x", "num_bytes": 1}]},
    {"counts": 5},
    {"counts": {"num_rows": "x"}},
    {"counts": {"num_rows": -1}},
    {"counts": {"finish_reasons": {"stop": None}}},
    {"counts": {"errors": {"a": {"num_rows": "x", "example": 5}}}},
    {"counts": {"input_tokens": {"count": 1, "total": 1, "smallest": 1, "largest": 1, "buckets": [[1]]}}},
    {"counts": {"input_tokens": {"count": 1, "total": 1, "smallest": 1, "largest": 1, "buckets": [[10**9, 1]]}}},
    {"table_version": "x"},
]


@pytest.mark.parametrize("odd", ODD_MANIFESTS)
def test_a_manifest_with_odd_values_is_refused(folder: JobFolder, odd: dict[str, Any]) -> None:
    (folder.root / "_manifest.json").write_bytes(json.dumps(Manifest().as_dict() | odd).encode())
    with pytest.raises(DamagedOutputError, match="is no manifest of an output"):
        Manifest.read(folder.root)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.write_text("[" * 200_000)])
def test_a_file_of_an_output_that_is_another_thing_is_refused(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Any]
) -> None:
    spec, plan = interrupt_before_moving(folder, monkeypatch)
    part = work_files(folder, ".parquet")[0]
    for file in (part, plan, Path((folder.root / "_manifest.json").url)):
        file.unlink(missing_ok=True)
        make(file)
    for read in (lambda: publish(folder.root, spec), lambda: Manifest.read(folder.root)):
        with pytest.raises(DamagedOutputError):
            read()
    plan.rmdir() if plan.is_dir() else plan.unlink()
    with pytest.raises(DamagedOutputError):
        publish(folder.root, spec)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"moves": 1}', b"\xff"])
def test_a_damaged_plan_is_refused_with_its_name(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    spec, file = interrupt_before_moving(folder, monkeypatch)
    file.write_bytes(content)
    with pytest.raises(DamagedOutputError, match=r"publish\.json' is damaged"):
        publish(folder.root, spec)


def test_a_plan_that_was_changed_is_refused(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, file = interrupt_before_moving(folder, monkeypatch)
    file.write_text(file.read_text().replace('"num_rows": 2', '"num_rows": 3'))
    with pytest.raises(DamagedOutputError, match=r"publish\.json' has changed"):
        publish(folder.root, spec)


def test_a_part_that_was_damaged_while_it_was_published_can_run_again(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = interrupt_before_moving(folder, monkeypatch)
    (part,) = work_files(folder, ".parquet")
    part.write_bytes(b"")
    with pytest.raises(DamagedOutputError, match=part.name):
        publish(folder.root, spec)
    part.unlink()
    part.with_suffix(".ids").unlink()
    write_block(ResultWriter(spec, max_blocks=2), [0, 1, 2])
    assert publish(folder.root, spec).total.num_rows == 3


def test_a_writer_that_was_taken_over_publishes_nothing(folder: JobFolder) -> None:
    spec = spec_of(folder)
    with Claim.held(folder.writers, "out") as first:
        write_block(ResultWriter(spec, max_blocks=2), [0, 1])
        with Claim.held(folder.writers, "out", take_over=True) as second:
            with pytest.raises(OutputInUseError):
                publish(folder.root, spec, claim=first)
            assert not folder.is_finished
            assert publish(folder.root, spec, claim=second).num_rows == 2


def test_a_writer_that_is_taken_over_during_its_commit_leaves_the_output_of_its_follower_alone(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(folder)
    with contextlib.ExitStack() as second, Claim.held(folder.writers, "out") as first:
        write_block(ResultWriter(spec, max_blocks=2), [0, 1, 2])

        def take_over(*args: Any) -> None:
            second.enter_context(Claim.held(folder.writers, "out", take_over=True))
            folder.clear(FORMATS["parquet"].publisher)
            write_block(ResultWriter(spec, max_blocks=2), [0, 1])

        monkeypatch.setattr(type(FORMATS["parquet"].publisher), "commit", take_over)
        with pytest.raises(OutputInUseError):
            publish(folder.root, spec, claim=first)
        assert not folder.is_finished and done(folder) == 2


def test_a_writer_that_is_taken_over_between_two_moves_says_so(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, move = spec_of(folder, max_rows_per_file=1), Storage.move_to
    with contextlib.ExitStack() as second, Claim.held(folder.writers, "out") as first:
        write_block(ResultWriter(spec, max_blocks=2), [0, 1, 2])

        def move_and_lose(part: Storage, place: Storage) -> None:
            move(part, place)
            second.enter_context(Claim.held(folder.writers, "out", take_over=True))
            folder.clear(FORMATS["parquet"].publisher)

        monkeypatch.setattr(Storage, "move_to", move_and_lose)
        with pytest.raises(OutputInUseError):
            publish(folder.root, spec, claim=first)
        assert not folder.is_finished


def test_a_writer_that_was_followed_ends_at_its_next_flush(folder: JobFolder) -> None:
    writer = ResultWriter(spec_of(folder), max_blocks=4)
    write_block(writer, [0])
    Done.find(folder.work)
    with pytest.raises(OutputInUseError, match="another run has begun"):
        write_block(writer, [1])
    assert done(folder) == 1


def test_a_writer_of_a_job_that_was_replaced_adds_nothing_to_the_new_one(folder: JobFolder) -> None:
    old = ResultWriter(spec_of(folder), max_blocks=4)
    write_block(old, [7])
    folder.work.remove()  # As with --overwrite.
    write_block(ResultWriter(spec_of(folder), max_blocks=4), [0])
    with pytest.raises(OutputInUseError):
        write_block(old, [8])
    assert publish(folder.root, spec_of(folder)).num_rows == 1


def test_drafts_of_killed_processes_are_swept_and_other_files_are_not(folder: JobFolder) -> None:
    drafts = ["._manifest.json.0123456789ab.tmp", "_millrace/.job.json.0123456789ab.tmp", "_failed/.a.0123456789ab.tmp"]
    others = [".hidden.tmp", "mine.0123456789ab.tmp", "._manifest.json"]
    for name in (*drafts, *others):
        (folder.root / name).write_bytes(b"half")
    folder.sweep()
    assert sorted(one.url for one in folder.root.walk()) == sorted((folder.root / name).url for name in others)
