"""Rows of any Python values: each is written as it would be alone, or is a dead letter; none changes another one."""

from __future__ import annotations

import csv
import datetime as dt
import itertools
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.pipeline.files.storage import Storage
from millrace.pipeline.job.folder import JobFolder
from millrace.pipeline.json_text import to_json
from millrace.pipeline.ledger import row_id
from millrace.pipeline.mixed_values import MAX_FIELDS
from millrace.pipeline.sinks.formats import FORMATS
from millrace.pipeline.sinks.parts import OutputSpec
from millrace.pipeline.sinks.publish import Expected, publish
from millrace.pipeline.sinks.tables import Finished, failed_tables, result_tables
from millrace.pipeline.sinks.writer import ResultWriter
from millrace.pipeline.sources.base import position_column
from millrace.pipeline.stages.base import Row, RowError

WEST = dt.timezone(dt.timedelta(hours=-8))
VALUES: dict[str, Any] = {
    "flag": True,
    "number": 5,
    "fraction": 1.5,
    "big": 2**63 + 5,
    "text": "a",
    "number in text": "12",
    "bytes": b"\x01",
    "date": dt.date(2020, 1, 1),
    "moment": dt.datetime(2020, 1, 1, 5, 6),
    "moment in a zone": dt.datetime(2020, 1, 1, 5, 6, tzinfo=WEST),
    "moment in UTC": dt.datetime(2020, 1, 1, 5, 6, tzinfo=dt.UTC),
    "time": dt.time(1, 2, 3),
    "span": dt.timedelta(1),
    "decimal": Decimal("12345678901234567890.12"),
    "object": {"a": 1},
    "other object": {"b": "x", "c": {}},
    "list": [1],
    "list of text": ["x"],
    "list of objects": [{"a": None}, {"z": b"1"}],
    "nothing": [],
}


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(Storage.at(tmp_path / "out"))


def write(folder: JobFolder, rows: list[dict[str, Any]], num_flushes: int = 1, **changes: Any) -> list[Path]:
    """Writes rows, some in each flush, and returns the files."""
    spec = OutputSpec(folder.work, **{"flush_interval_s": 60.0, **changes})
    writer = ResultWriter(spec, max_blocks=2)
    for places in np.array_split(range(len(rows)), num_flushes):
        with writer.block(row_id.from_arrow(position_column(0, list(places)))) as block:
            for at, one in zip(places, block.row_ids, strict=True):
                row = Row({"at": int(at)}, rows[at])
                writer.append(block, one, row, Row(rows[at], rows[at]))
    manifest = publish(folder.root, spec, expected=Expected(len(rows), is_exact=True))
    return [Path((folder.root / one.name).url) for one in manifest.files]


def shown(value: Any) -> str:
    """A value with its type; equal integers and fractions are alike."""
    return repr(float(value) if type(value) is int else value)


def lines(files: list[Path]) -> list[Any]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("num_flushes", [1, 7, len(VALUES)])
def test_a_value_of_another_row_changes_none(folder: JobFolder, num_flushes: int, is_ordered: bool) -> None:
    files = write(folder, [{"v": one} for one in VALUES.values()], num_flushes, format="jsonl", is_ordered=is_ordered)
    written = [row["v"] for row in lines(files)]
    expected = [json.loads(to_json(one)) for one in VALUES.values()]
    assert sorted(map(shown, written)) == sorted(map(shown, expected))


@pytest.mark.parametrize(
    "pair", [*itertools.permutations(["flag", "number", "date", "moment", "text", "bytes", "span"], 2)]
)
def test_types_that_a_column_would_mix_have_tables_of_their_own(pair: tuple[str, str]) -> None:
    values = [VALUES[name] for name in pair]
    for nested in (values, [[one] for one in values], [{"x": [one]} for one in values]):
        rows = [Finished(bytes(12), Row({}, {"v": one}), Row({}, {})) for one in nested]
        groups, unfit = result_tables(rows, None)
        assert not unfit
        assert sorted(map(repr, (one for _, table in groups for one in table["v"].to_pylist()))) == sorted(
            map(repr, nested)
        )


def test_objects_with_many_keys_keep_their_own_and_cost_no_more(folder: JobFolder) -> None:
    rows = [{"v": {"scores": {f"document {at}": at}}, "w": "x" if at == 0 else 1} for at in range(2_000)]
    files = write(folder, rows, num_flushes=3, format="jsonl")
    assert sorted(map(str, lines(files))) == sorted(map(str, rows))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) < 2 * len(json.dumps(rows))


@pytest.mark.parametrize("num_keys", [2, MAX_FIELDS + 1])
def test_a_struct_has_the_keys_of_all_rows_unless_these_are_many(folder: JobFolder, num_keys: int) -> None:
    rows = [{"v": {f"k{at}": at}} for at in range(num_keys)]
    (file,) = write(folder, rows, format="parquet")
    read = pq.read_table(file)["v"].to_pylist()
    if num_keys == 2:
        assert read == [{"k0": 0, "k1": None}, {"k0": None, "k1": 1}]
    else:
        assert list(map(json.loads, read)) == [row["v"] for row in rows]


def test_a_column_of_the_user_with_a_name_of_ours_keeps_what_our_type_lacks(folder: JobFolder) -> None:
    row = {
        "outputs": [{"text": "a", "score": 0.5}],
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "strict": True}}],
        "embeddings": [0.1, 0.123456789012345],
        "num_input_tokens": 1.5,
        "finish_reason": True,
    }
    assert lines(write(folder, [row], format="jsonl")) == [row]


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet", "arrow"])
@pytest.mark.parametrize("is_ordered", [False, True])
def test_a_row_without_columns_is_a_dead_letter(folder: JobFolder, format: str, is_ordered: bool) -> None:
    write(folder, [{}, {"v": 1}, {}], format=format, is_ordered=is_ordered)
    letters = pq.read_table((folder.root / "_failed").url).to_pylist()
    assert [one["__error_message"] for one in letters] == ["the row has no column to write"] * 2


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet", "arrow"])
@pytest.mark.parametrize("is_ordered", [False, True])
def test_values_that_only_a_library_knows_are_written(folder: JobFolder, format: str, is_ordered: bool) -> None:
    months = pa.MonthDayNano([1, 2, 3])
    rows = [{"v": months}, {"v": [months]}, {"v": pa.scalar(5)}, {"v": 6}, {"v": np.int64(7)}, {"v": np.array([1, 2])}]
    write(folder, rows, format=format, is_ordered=is_ordered)
    assert not (folder.root / "_failed").list()


@pytest.mark.parametrize(
    "value", ["12", float("nan"), float("inf"), -5, [1], {}, np.int64(5), Decimal(5), 10**400, b"x"]
)
def test_columns_of_the_user_with_names_of_counts_are_written_and_not_counted(folder: JobFolder, value: Any) -> None:
    names = ["num_input_tokens", "num_generated_tokens", "num_cached_tokens", "metrics", "finish_reason"]
    rows = [{"v": 1, name: value} for name in names] + [{"v": 1, "metrics": {"queue_s": value, "e2e_s": 1.0}}]
    spec = OutputSpec(folder.work, format="jsonl")
    writer = ResultWriter(spec, max_blocks=2)
    with writer.block(row_id.from_arrow(position_column(0, list(range(len(rows)))))) as block:
        for one, data in zip(block.row_ids, rows, strict=True):
            row = Row({}, data)
            writer.append(block, one, row, row)
    counts = writer.take_counts()
    assert counts.num_rows == len(rows)
    assert counts.e2e_s.count == (counts.num_failed == 0) or value == 10**400
    assert counts.num_input_tokens == counts.num_output_tokens == 0


@pytest.mark.parametrize("value", ["x", float("nan"), [1], -1, 10**30, True])
def test_attempts_that_are_no_number_count_as_none(value: Any) -> None:
    row = Row({"__error_attempts": value}, {}, RowError("a", "b", "c", attempts=2))
    ((_, table),) = failed_tables([Finished(bytes(12), row, row)], None)
    assert table["__error_attempts"].to_pylist() == [2]


BAD_TEXT = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
NANOSECOND = pa.array([5], pa.time64("ns"))


@pytest.mark.parametrize("format", ["jsonl", "csv"])
@pytest.mark.parametrize(
    ("array", "text"),
    [
        (BAD_TEXT, "\\xff"),
        (pa.StructArray.from_arrays([BAD_TEXT, pa.array([float("nan")])], ["a", "b"]), {"a": "\\xff", "b": None}),
        (pa.StructArray.from_arrays([BAD_TEXT, NANOSECOND], ["a", "a"]), [["a", "\\xff"], ["a", "00:00:00.000000005"]]),
        (pa.ListArray.from_arrays([0, 1], NANOSECOND), ["00:00:00.000000005"]),
        (pa.MapArray.from_arrays([0, 1], pa.array(["k"]), NANOSECOND), [["k", "00:00:00.000000005"]]),
        (pa.StructArray.from_arrays([pa.ListArray.from_arrays([0, 1], BAD_TEXT)], ["z"]), {"z": ["\\xff"]}),
    ],
)
def test_values_that_python_lacks_are_text_inside_of_others_too(format: str, array: pa.Array, text: Any) -> None:
    content = FORMATS[format].encode(pa.table({"v": array})).decode()
    if format == "jsonl":
        assert json.loads(content)["v"] == text
    else:
        ((cell,),) = list(csv.reader(content.splitlines()))[1:]
        assert cell == (text if isinstance(text, str) else json.dumps(text))
