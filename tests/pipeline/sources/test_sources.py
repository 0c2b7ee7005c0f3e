"""Finding and looking through input files, and reading them in parts."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import struct
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from millrace import ConfigError
from millrace.pipeline import columns
from millrace.pipeline.arrow_values import to_rows
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.sources import READ_ERROR, READ_ROW, Source, base, text
from millrace.pipeline.sources.formats import FORMATS, jsonl, parquet

KINDS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "arrow", "arrows")


def write_lines(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Writes rows in the format that the name tells."""
    table = pa.Table.from_pylist(list(rows))
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    kind, _, compression = path.name.partition(".")[2].partition(".")
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
    elif kind in ("arrow", "arrows"):
        opened = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
        with opened(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        if kind == "csv":
            sink = pa.BufferOutputStream()
            pyarrow.csv.write_csv(table, sink)
            lines = sink.getvalue().to_pybytes()
        codec = {"": None, "gz": "gzip", "zst": "zstd"}[compression]
        with pa.output_stream(str(path), compression=codec) as file:
            file.write(lines)
    return str(path)


def read_units(source: Source) -> list[dict[str, Any]]:
    """Reads all parts of a source in order; every row has a place of its own."""
    tables = (table for unit in source.units for table in source.tables(unit))
    rows = [row for table in tables for row in table.to_pylist()]
    places = [row[columns.POSITION] for row in rows]
    assert places == sorted(set(places))
    assert source.num_rows in (None, len(rows))
    return rows


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts inputs as if they were large, and looks through little of them."""
    monkeypatch.setattr(text, "UNIT_BYTES", 100)
    monkeypatch.setattr(parquet, "UNIT_BYTES", 100)
    monkeypatch.setattr(parquet, "MAX_ROWS", 5)
    monkeypatch.setattr(text, "LOOK_BYTES", 300)
    monkeypatch.setattr(text, "SAMPLE_BYTES", 300)
    monkeypatch.setattr(text, "MAX_SAMPLES", 3)
    monkeypatch.setattr(base, "TABLE_BYTES", 200)
    monkeypatch.setattr(text, "TABLE_BYTES", 200)


def test_parquet_folders_and_patterns(tmp_path: Path) -> None:
    for index in range(3):
        pq.write_table(pa.table({"id": [index, index]}), tmp_path / f"{index}.parquet")
    (tmp_path / "_SUCCESS").touch()
    assert Source.find(str(tmp_path)).num_rows == 6
    assert len(Source.find(str(tmp_path / "[01].parquet")).paths) == 2
    source = Source.find([str(tmp_path / "0.parquet"), str(tmp_path / "2.parquet")])
    assert source.schema.names == ["id"]
    assert [file.size for file in source.files] == [os.path.getsize(path) for path in source.paths]
    assert len({file.etag for file in source.files} | {""}) == 3


def test_types_of_json_lines_hold_every_row(tmp_path: Path) -> None:
    rows = [{"a": 1, "m": "x", "n": None}, {"a": 2.5, "m": 3, "c": [1]}, {"a": None, "m": {"k": 1}}]
    source = Source.find(write_lines(tmp_path / "x.jsonl", *rows))
    types = {"a": pa.float64(), "m": pa.string(), "n": pa.string(), "c": pa.list_(pa.int64())}
    assert {field.name: field.type for field in source.schema} == types
    assert source.num_rows == 3


def test_lines_that_are_no_rows_become_error_rows_and_the_others_are_read(tmp_path: Path) -> None:
    lines = [b'{"a":1,"m":"x"}', b"", b"{broken", b"[1]", b'{"a":2,"m":3}', b'{"a":3,"m":"\xff"}', b'{"a":4}']
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    rows = read_units(Source.find(str(path)))
    assert [row["a"] for row in rows] == [1, None, None, 2, None, 4]
    assert [row["m"] for row in rows] == ["x", None, None, "3", None, None]
    said = ["not JSON", "JSON list, not an object", "not UTF-8"]
    errors = [row[READ_ERROR] for row in rows if row[READ_ERROR] is not None]
    assert [part in error for part, error in zip(said, errors, strict=True)] == [True] * 3


@pytest.mark.usefixtures("small_parts")
def test_values_outside_of_the_sample_may_not_fit_their_column(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Any] = [{"a": index, "b": "x" * 20} for index in range(100)]
    rows[97] = {"a": "text", "b": 1}
    rows[98] = {"a": 98, "new": 1}
    source = Source.find(write_lines(tmp_path / "x.jsonl", *rows))
    assert source.num_rows is None
    read = read_units(source)
    assert [row["a"] for row in read] == [*range(97), None, 98, 99]
    assert "column 'a' holds 'text', which is not int64" in read[97][READ_ERROR]
    assert (read[97]["b"], json.loads(read[97][READ_ROW])) == ("1", rows[97])
    assert [row[READ_ERROR] for row in read[98:]] == [None, None]
    assert "left out: new" in caplog.text


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", KINDS)
def test_units_hold_every_row_once_in_order(tmp_path: Path, kind: str) -> None:
    files = [[{"id": 100 * file + index, "line": f"row {index}\n, "} for index in range(90)] for file in range(3)]
    paths = [write_rows(tmp_path / f"{index}.{kind}", rows) for index, rows in enumerate(files)]
    rows = read_units(Source.find(paths))
    assert [(row["id"], row["line"]) for row in rows] == [(row["id"], row["line"]) for file in files for row in file]
    assert not any(row[READ_ERROR] for row in rows)


@pytest.mark.usefixtures("small_parts")
def test_units_know_the_positions_of_their_rows(tmp_path: Path) -> None:
    for kind in ("parquet", "jsonl"):
        rows = [{"id": index} for index in range(200)]
        source = Source.find([write_rows(tmp_path / f"{part}.{kind}", rows) for part in range(2)])
        assert len(source.units) > 10
        for unit in source.units:
            low, high = unit.bounds()
            tables = list(FORMATS[kind].read(unit, source.schema))
            places = [place for table in tables for place in table[columns.POSITION].to_pylist()]
            assert all(low <= place < high for place in places)
            assert unit.num_rows in (None, len(places))


def test_a_csv_whose_types_change_is_text(tmp_path: Path) -> None:
    typed, mixed = tmp_path / "a.csv", tmp_path / "b.csv"
    typed.write_text("id,line\n1,a\n2,b\n")
    filler = "".join(f"{index},a\n" for index in range(400_000))
    mixed.write_text(f"id,line\n{filler}x,b\n")
    assert Source.find(str(typed)).schema.field("id").type == pa.int64()
    source = Source.find(str(mixed))
    assert source.schema.field("id").type == pa.string()
    assert source.num_rows == 400_001


@pytest.mark.parametrize(
    "cells",
    [
        ["12345678901234567890", "1"],
        ["9007199254740993", "1.5"],
        ["00501", "10001"],
        ["1.50", "2.5"],
        ["1.0"],
        ["1e5"],
        ["-0"],
        ["0.1", "0.30000000000000004"],
        ["NA", "SE"],
        ["1", "NA"],
        ["2024-01-01", "null"],
        ["true", "nan"],
        ["1.5", "NaN", "#N/A"],
        ["2024-01-01T10:00:00Z"],
        ["2024-01-01 10:00:00.5"],
        ["7", "-12"],
        ["2024-01-01"],
    ],
)
def test_csv_gives_every_text_back(tmp_path: Path, cells: list[str]) -> None:
    path = tmp_path / "x.csv"
    path.write_text("\n".join(["a", *cells]))
    assert [str(row["a"]) for row in read_units(Source.find(str(path)))] == cells
    for index, cell in enumerate(cells):  # In files of their own, the values must share a type too.
        (tmp_path / f"{index}.csv").write_text(f"a\n{cell}\n")
    path.unlink()
    assert [str(row["a"]) for row in read_units(Source.find(str(tmp_path)))] == cells


@pytest.mark.usefixtures("small_parts")
def test_a_text_outside_of_the_sample_that_its_type_would_change_is_an_error_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("\n".join(["zip,a", *(f"{10000 + index},{'x' * 20}" for index in range(200)), "00501,y"]))
    *rows, last = read_units(Source.find(str(path)))
    assert [row["zip"] for row in rows] == [10000 + index for index in range(200)]
    assert "int64 does not give back the text of 'zip'; list it in columns_as_text): 00501,y" in last[READ_ERROR]
    assert read_units(Source.find(str(path), as_text=["zip"]))[-1]["zip"] == "00501"


def test_numbers_in_a_column_of_text_keep_their_digits(tmp_path: Path) -> None:
    texts = ["1.10", "0.1234567890123456789", "1e5", "7", "null"]
    lines = "".join(f'{{"a": {text}, "b": {text}}}\n' for text in texts)
    (tmp_path / "x.jsonl").write_text(lines)
    rows = read_units(Source.find(str(tmp_path / "x.jsonl"), as_text=["a"]))
    assert [row["a"] for row in rows] == [*texts[:-1], None]
    assert [row["b"] for row in rows] == [1.1, 0.1234567890123456789, 1e5, 7.0, None]


def test_half_of_a_surrogate_pair_costs_its_row_only(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"n": 1}\n{"n": 2, "\\ud800": 1}\n{"n": "\\ud800"}\n{"n": 4}\n')
    source = Source.find(str(tmp_path / "x.jsonl"))
    assert source.schema.field("n").type == pa.int64()
    rows = read_units(source)
    assert [row["n"] for row in rows] == [1, None, None, 4]
    assert "a name in the line holds half of a surrogate pair" in rows[1][READ_ERROR]
    assert "column 'n' holds '\\ud800', which is not int64" in rows[2][READ_ERROR]


def test_columns_as_text_are_checked(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "x.jsonl", {"a": 9007199254740993}, {"a": 1.5})
    assert [row["a"] for row in read_units(Source.find(lines, as_text=["a"]))] == ["9007199254740993", "1.5"]
    with pytest.raises(ConfigError, match="columns_as_text: the input has no column 'b'; known: a"):
        Source.find(lines, as_text=["b"])
    with pytest.raises(ConfigError, match="columns_as_text is for csv and jsonl; the columns of parquet have types"):
        Source.find(write_rows(tmp_path / "x.parquet", [{"a": 1}]), as_text=["a"])


def test_a_column_of_csv_that_no_file_of_the_sample_has_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(text, "LOOK_BYTES", 1)
    monkeypatch.setattr(text, "MAX_SAMPLES", 1)
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(f"id,{name}\n1,x\n")
    rows = read_units(Source.find(str(tmp_path)))
    assert [(row["id"], row["a"], row[READ_ERROR]) for row in rows] == [(1, "x", None), (1, None, None)]
    assert "b.csv has columns that the files looked at before the start lack, and they are left out: b" in caplog.text


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_lines_of_csv_end_in_any_way(tmp_path: Path, end: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(end.join(["id,line", "1,a", f'2,"b{end}c"', "", "3,d"]).encode())
    source = Source.find(str(path))
    assert source.num_rows == 3
    assert [(row["id"], row["line"]) for row in read_units(source)] == [(1, "a"), (2, f"b{end}c"), (3, "d")]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("inside", ["\r", "\n"])
def test_a_line_end_inside_of_a_name_does_not_end_the_header_of_csv(tmp_path: Path, end: str, inside: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(end.join([f'id,"a{inside}b"', "1,x", "2,y"]).encode())
    rows = read_units(Source.find(str(path)))
    assert [(row["id"], row[f"a{inside}b"]) for row in rows] == [(1, "x"), (2, "y")]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_lines_of_json_end_in_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, end: str
) -> None:
    monkeypatch.setattr(text, "UNIT_BYTES", 7)  # Some units begin inside of a line end.
    content = end.join(['{"id": 1}', '{"id": 2, "line": "b"}', "", "{", '{"id": 3}', '{"id": 4}']).encode()
    path = tmp_path / f"x.jsonl{compression}"
    path.write_bytes(gzip.compress(content) if compression else content)
    source = Source.find(str(path))
    assert source.num_rows == 5
    assert [(row["id"], row["line"]) for row in read_units(source)] == [
        *[(1, None), (2, "b"), (None, None)],
        *[(3, None), (4, None)],
    ]


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_lines_of_text_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str) -> None:
    monkeypatch.setattr(text, "UNIT_BYTES", 7)
    content = b"\xef\xbb\xbffirst line\r\n\n  \n indented\nnot \xff text\nlast"
    path = tmp_path / f"x.txt{compression}"
    path.write_bytes(gzip.compress(content) if compression else content)
    source = Source.find(str(path))
    assert (source.num_rows, source.schema) == (4, pa.schema([("text", pa.string())]))
    rows = read_units(source)
    assert [row["text"] for row in rows] == ["first line", " indented", None, "last"]
    assert "the line is not UTF-8" in rows[2][READ_ERROR] and rows[2][READ_ROW] == "not \\xff text"


def test_notes_beside_data_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("about the data")
    assert Source.find(str(tmp_path)).schema.names == ["text"]
    write_rows(tmp_path / "x.jsonl", [{"id": 1}])
    assert Source.find(str(tmp_path)).schema.names == ["id"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_that_would_fill_the_memory_is_an_error_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 60)
    monkeypatch.setattr(text, "UNIT_BYTES", 100)
    rows = [{"id": 1, "x": "a"}, {"id": 2, "x": "b" * 200}, {"id": 3, "x": "c"}, {"id": 4, "x": "d"}]
    path = Path(write_rows(tmp_path / f"x.{kind}", rows))
    first, error, *others = read_units(Source.find(str(path)))
    assert (first["id"], error["id"]) == (1, None)
    assert "a line of more than 60 bytes" in error[READ_ERROR]
    assert [row["id"] for row in others] == ([3, 4] if kind == "jsonl" else [])  # They start in another unit.


def test_objects_with_values_as_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_COLUMNS", 5)
    for at in range(2):
        write_lines(tmp_path / f"{at}.jsonl", {f"name {at}.{name}": 1 for name in range(4)})
    assert len(Source.find(str(tmp_path / "0.jsonl")).schema) == 4
    with pytest.raises(ConfigError, match=r"more than 5 names, such as 'name 0\.0'"):
        Source.find(str(tmp_path))


def test_records_of_csv_that_are_no_rows_become_error_rows_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'id,line\n1,"a\nb, ""q"""\n\n2,x\n3\n4,5" pipe\n5,\xff\n6,"never closed\n7,y\n')
    rows = read_units(Source.find(str(path)))
    assert [row["id"] for row in rows] == [1, 2, None, 4, None, 6, 7]
    assert [row["line"] for row in rows][:4] == ['a\nb, "q"', "x", None, '5" pipe']
    assert "Expected 2 columns, got 1" in rows[2][READ_ERROR]
    assert "invalid UTF8" in rows[4][READ_ERROR]


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_rows_before_the_end_of_a_truncated_file_are_read(tmp_path: Path, compression: str) -> None:
    rows = [{"id": index, "line": os.urandom(50).hex()} for index in range(5000)]
    path = Path(write_rows(tmp_path / f"x.jsonl.{compression}", rows))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    read = read_units(Source.find(str(path)))
    assert [row["id"] for row in read[:-1]] == list(range(len(read) - 1))
    assert 1500 < len(read) < 3000
    assert "cannot be read from byte" in read[-1][READ_ERROR]


def test_a_damaged_row_group_becomes_error_rows_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": range(300), "line": ["x"] * 300}), path, row_group_size=100)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 60] = b"\xff" * 60
    path.write_bytes(content)
    rows = read_units(Source.find(str(path)))
    assert [row["id"] for row in rows] == [*range(100), *[None] * 100, *range(200, 300)]
    assert all(f"row group 1 of {path} is damaged" in row[READ_ERROR] for row in rows[100:200])


def test_files_may_lack_columns_and_have_narrower_types(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": pa.array([1], pa.int32()), "a": ["x"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"b": [1.5], "id": pa.array([2], pa.int64())}), tmp_path / "1.parquet")
    rows = read_units(Source.find(str(tmp_path)))
    values = [{name: row[name] for name in ("id", "a", "b")} for row in rows]
    assert values == [{"id": 1, "a": "x", "b": None}, {"id": 2, "a": None, "b": 1.5}]


def read_files(folder: Path, *columns: pa.Array, kind: str = "parquet") -> list[dict[str, Any]]:
    """Reads files that each have one of the columns, and `id`, as one input."""
    for at, column in enumerate(columns):
        table = pa.table({"x": column, "id": [f"{at}.{row}" for row in range(len(column))]})
        if kind == "parquet":
            pq.write_table(table, folder / f"{at}.parquet")
        else:
            with pyarrow.ipc.new_file(str(folder / f"{at}.arrow"), table.schema) as writer:
                writer.write_table(table)
    return read_units(Source.find(str(folder)))


def test_an_object_of_json_lines_is_its_own(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"arguments": "{}"}]}
    rows: list[dict[str, Any]] = [
        {"meta": {"a": 1}, "messages": "hi", "metadata": {}, "calls": [call]},
        {"meta": {f"k{at}": None for at in range(20)}, "messages": [{"role": "user", "content": "1"}], "metadata": {}},
        {"meta": None, "messages": [{"content": [{"type": "text"}]}], "calls": [{"tool_calls": [{"arguments": {}}]}]},
        {"meta": {"a": 10**20}, "messages": "7"},
    ]
    source = Source.find(write_lines(tmp_path / "x.jsonl", *rows))
    (unit,) = source.units
    read = [row for table in FORMATS["jsonl"].read(unit, source.schema) for row in to_rows(table, source.schema)]
    assert [{name: row[name] for name in given} for given, row in zip(rows, read, strict=True)] == rows
    assert {row[READ_ERROR] for row in read} == {None}
    one = Source.find(write_lines(tmp_path / "y.jsonl", *rows[:2])).schema.field("metadata")
    assert one.type == pa.struct([])


@pytest.mark.parametrize(
    "line",
    ['{"x": "\\ud800"}', '{"x": ' + "[" * 900 + "]" * 900 + "}", '{"x": [1, "\\udfff"], "y": [{}]}'],
    ids=["half", "deep", "nested half"],
)
def test_a_line_that_no_column_holds_costs_itself_at_most(tmp_path: Path, line: str) -> None:
    rows = read_units(Source.find(write_lines(tmp_path / "x.jsonl", {"x": "a", "id": 1}, line, {"x": "b", "id": 2})))
    assert [row["id"] for row in rows] == [1, None, 2]
    assert rows[1][READ_ROW] in (None, line)


NEW_YEAR = 253_402_300_800  # Seconds: the first day that Python has no date for.


@pytest.mark.parametrize(
    ("columns", "values", "unfit"),
    [
        (
            [pa.array([10**15, NEW_YEAR * 10**6], pa.timestamp("us")), pa.array([10**18 + 1], pa.timestamp("ns"))],
            ["2001-09-09 01:46:40", None, "2001-09-09 01:46:40.000000001"],
            {"x": "10000-01-01 00:00:00.000000", "id": "0.1"},
        ),
        ([pa.array([7, 2**53 + 1]), pa.array([1.5])], [7.0, None, 1.5], {"x": 2**53 + 1, "id": "0.1"}),
        ([pa.array([-1]), pa.array([2**64 - 1], pa.uint64())], [-1, 2**64 - 1], None),
        ([pa.array([5]), pa.array(["a"])], ["5", "a"], None),
        ([pa.array(["hi"]), pa.array([[{"text": "ho"}]])], ["hi", '[{"text": "ho"}]'], None),
        ([pa.array([{"a": 1}]), pa.array([{"b": "x"}])], [{"a": 1, "b": None}, {"a": None, "b": "x"}], None),
        ([pa.array(["a"], pa.string_view()), pa.array(["b"])], ["a", "b"], None),
    ],
    ids=["times", "numbers", "unsigned", "text", "messages", "objects", "views"],
)
def test_files_whose_types_differ_lose_only_rows_that_fit_no_common_type(
    tmp_path: Path, columns: list[pa.Array], values: list[Any], unfit: dict[str, Any] | None
) -> None:
    rows = read_files(tmp_path, *columns)
    assert [str(row["x"]) if "time" in str(columns[0].type) and row["x"] else row["x"] for row in rows] == values
    assert len({row["id"] for row in rows}) == len(rows)
    assert [json.loads(row[READ_ROW]) for row in rows if row[READ_ERROR] is not None] == ([unfit] if unfit else [])


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b"], pa.string_view()),
        pa.array([1, 1], pa.run_end_encoded(pa.int32(), pa.int64())),
        pa.array([["a"], None], pa.list_view(pa.string_view())),
        pa.array([b"x" * 16, None], pa.uuid()),
    ],
    ids=str,
)
def test_types_that_few_functions_take_are_read_as_plain_ones(tmp_path: Path, column: pa.Array) -> None:
    assert [row["x"] for row in read_files(tmp_path, column, kind="arrow")] == column.to_pylist()


def test_a_number_of_too_many_digits_in_arrow_costs_its_row(tmp_path: Path) -> None:
    numbers = pa.Array.from_buffers(pa.decimal128(5, 2), 2, [None, pa.py_buffer(np.array([5, 0, 5, 5], "<u8"))])
    lists = pa.ListViewArray.from_arrays(pa.array([0, 1, 0], pa.int32()), pa.array([1, 1, 1], pa.int32()), numbers)
    rows = read_files(tmp_path, lists, kind="arrow")
    assert [row["x"] for row in rows] == [[Decimal("0.05")], None, [Decimal("0.05")]]
    assert "column 'x' holds" in rows[1][READ_ERROR]


def test_each_row_of_the_lost_rest_of_an_arrow_file_is_an_error_row(tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / "x.arrows", [{"id": number} for number in range(50)]))
    source = Source.find(str(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = read_units(source)
    assert [row["id"] for row in rows if row[READ_ERROR] is None] == list(range(21))
    assert len(rows) == 50


def test_a_record_of_csv_in_the_sample_may_have_other_bytes_than_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"id,line\n1,a\n2,\xff,\xad\n\xad\n3,b\n")
    rows = read_units(Source.find(str(tmp_path / "x.csv")))
    assert [row["id"] for row in rows] == [1, None, None, 3]


def test_a_parquet_column_that_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.parquet", [{"id": 1, "other": 2}])
    (row,) = read_units(Source.find(path).with_columns({"id", "prompt"}))
    assert row.keys() == {"id", columns.POSITION, READ_ERROR, READ_ROW}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.parquet", None, "does not exist"),
        ("x.log", b"x", "format of"),
        ("bad.parquet", b"no parquet", "bad.parquet' cannot be read as parquet"),
        ("bad.arrow", b"no arrow", "bad.arrow' cannot be read as arrow"),
        ("array.json", b'[\n{"a": 1}\n]', "one JSON array"),
        ("line.json", b'[{"a": 1}, {"a": 2}]', "one JSON array; write one object per line"),
        ("open.json", b' [ {"a": 1},\n{"a": 2}]', "one JSON array"),
        ("bad.csv.gz", b"no gzip", r"the header of .*bad.csv.gz' cannot be read"),
        ("empty.csv", b"", "begins with the names of its columns"),
        ("twice.csv", b"a,a\n1,2\n", "names 'a' twice"),
        ("wide.jsonl", '{"a": 1}\n'.encode("utf-16"), "UTF-16; JSON lines are UTF-8"),
        ("x.parquet?", None, "does not exist"),
    ],
)
def test_mistakes_in_the_input_raise_errors(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        Source.find(str(tmp_path / name))


def test_a_broken_file_among_others_is_named_before_the_start(tmp_path: Path) -> None:
    for index in range(20):
        pq.write_table(pa.table({"id": [index]}), tmp_path / f"{index:02}.parquet")
    (tmp_path / "13.parquet").write_bytes((tmp_path / "13.parquet").read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"13\.parquet"):
        Source.find(str(tmp_path))


@pytest.mark.parametrize("name", ["what?.jsonl", "a[1].jsonl", "b*.jsonl", "?.jsonl.gz", "x#y z.jsonl"])
def test_a_file_of_a_folder_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, [{"id": 1}])
    write_rows(tmp_path / "z.jsonl", [{"id": 2}])
    assert [row["id"] for row in read_units(Source.find(str(tmp_path)))] == [1, 2]
    assert [row["id"] for row in read_units(Source.find(str(tmp_path / name)))] == [1]


def test_a_folder_in_a_pattern_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    for number, folder in enumerate(["a[1]", "a1", "a[1]/b*"]):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "x.jsonl", [{"id": number}])
    for given, ids in {"a[1]/*.jsonl": [0], "a[0-9]/*": [1], "a[1]/b*/*": [2]}.items():
        assert [row["id"] for row in read_units(Source.find(str(tmp_path / given)))] == ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["", "*/*/*", ["day=3/kind=a b", "day=12/kind=__HIVE_DEFAULT_PARTITION__"]])
def test_folders_that_name_a_value_give_a_column(tmp_path: Path, kind: str, given: str | list[str]) -> None:
    for number, folder in enumerate(["day=12/kind=__HIVE_DEFAULT_PARTITION__", "day=3/kind=a%20b"]):
        (tmp_path / folder).mkdir(parents=True)
        write_rows(tmp_path / folder / f"x.{kind}", [{"id": number}])
    places = [given] if isinstance(given, str) else sorted(given)
    source = Source.find([str(tmp_path / place.replace(" ", "%20")) for place in places])
    assert source.partition == ["day", "kind"]
    rows = [(row["id"], row["day"], row["kind"]) for row in read_units(source)]
    assert rows == [(0, 12, None), (1, 3, "a b")]


@pytest.mark.parametrize(("values", "read"), [(["3", "x"], ["3", "x"]), (["03"], ["03"]), (["9" * 19], ["9" * 19])])
def test_a_value_in_the_name_of_a_folder_keeps_its_digits(tmp_path: Path, values: list[str], read: list[str]) -> None:
    for value in values:
        (tmp_path / f"zip={value}").mkdir()
        write_rows(tmp_path / f"zip={value}" / "x.jsonl", [{"id": 1}])
    assert [row["zip"] for row in read_units(Source.find(str(tmp_path)))] == read


def test_a_column_of_the_file_wins_over_the_name_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "day=3").mkdir()
    write_rows(tmp_path / "day=3" / "x.parquet", [{"day": "Monday"}])
    assert [row["day"] for row in read_units(Source.find(str(tmp_path)))] == ["Monday"]


def test_folders_inside_of_a_folder_and_files_that_are_found_twice_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("sub", "_temporary", ".git"):
        (tmp_path / name).mkdir()
    file = Path(write_lines(tmp_path / "x.jsonl", {"id": 1}))
    write_lines(tmp_path / "sub" / "y.jsonl", {"id": 2})
    assert len(Source.find(str(tmp_path)).units) == 1
    assert f"the folders inside of input folder '{tmp_path}' are not read ('sub' and 0 more)" in caplog.text
    assert "more than once" not in caplog.text
    (tmp_path / "z.jsonl").symlink_to(file)
    assert len(Source.find([str(tmp_path), str(file)]).units) == 3
    assert f"the input has '{file}' and 0 more files more than once" in caplog.text


@pytest.mark.parametrize("name", ["__position", "__read_error", "__read_row"])
def test_a_column_with_a_name_that_reading_adds_is_refused(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / "x.jsonl", {name: "mine", "id": 1})
    with pytest.raises(ConfigError, match=name):
        Source.find(str(tmp_path))


def test_a_folder_without_input_files_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file of a known kind"):
        Source.find(str(tmp_path))


def test_a_lance_table_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "0.parquet", [{"id": 1}])
    (tmp_path / "_versions").mkdir()
    with pytest.raises(ConfigError, match="is a Lance table"):
        Source.find(str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_read_with_the_columns_of_its_sample(cluster: None, tmp_path: Path, kind: str) -> None:
    rows = [{"id": index, "line": f"row, {index}"} for index in range(50)]
    source = Source.find(write_rows(tmp_path / f"in.{kind}", rows))
    read = source.read().take_all()
    assert len({row.pop(columns.POSITION) for row in read}) == len(read) == source.num_rows
    assert {(row.pop(READ_ERROR), row.pop(READ_ROW)) for row in read} == {(None, None)}
    assert sorted(read, key=lambda row: row["id"]) == rows


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_limit_takes_the_first_rows(
    cluster: None, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "UNIT_BYTES", 100)
    rows = [{"id": index} for index in range(300)]
    source = Source.find([write_rows(tmp_path / f"{part}.{kind}", rows) for part in range(2)])
    assert sorted(row["id"] for row in source.read(limit=120).take_all()) == list(range(120))
    assert source.read(limit=301).count() == 301
    done = source.read(limit=120, is_done=lambda unit: unit.start == 0).take_all()
    assert not {row["id"] for row in done} - set(range(120))
    assert len(source.read().limit(7).take_all()) == 7
    assert source.read(is_done=lambda unit: True).count() == 0


def test_units_that_are_done_are_not_read(cluster: None, tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / f"{part}.jsonl", [{"id": part}] * 10) for part in range(3)]
    read = Source.find(paths).read(is_done=lambda unit: unit.file.ordinal == 1).take_all()
    assert sorted(row["id"] for row in read) == [0] * 10 + [2] * 10


def test_gzip_of_several_members_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(b'{"id": %d}\n' % index) for index in range(3)))
    assert [row["id"] for row in read_units(Source.find(str(path)))] == [0, 1, 2]


def test_a_flipped_bit_in_an_arrow_file_costs_the_rows_of_its_batch_at_most(tmp_path: Path) -> None:
    sink, table = pa.BufferOutputStream(), pa.table({"line": ["hello", "world"] * 50})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=60)
    data = bytearray(sink.getvalue().to_pybytes())
    data[data.find(struct.pack("<4i", 0, 5, 10, 15)) + 4 * 50 + 3] ^= 1 << 6  # The text would begin a gigabyte later.
    (tmp_path / "in.arrow").write_bytes(data)
    source = Source.find(str(tmp_path))
    rows = [row for unit in source.units for table in source.tables(unit) for row in table.to_pylist()]
    assert [row["line"] for row in rows] == [None] * 60 + ["hello", "world"] * 20
    assert {bool(row["__read_error"]) for row in rows[:60]} == {True}
    assert "in rows 0 to 59" in rows[0]["__read_error"] and rows[60]["__read_error"] is None


def test_text_that_is_no_utf8_in_an_arrow_file_costs_its_own_row(tmp_path: Path) -> None:
    raw = [pa.array([b"a", b"\xff", b"c"])]
    text = pa.Array.from_buffers(pa.string(), 3, raw[0].buffers())
    nested = pa.array([{"x": 1}] * 3, pa.struct([("x", pa.int64())]))
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), text)
    codes = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), text)
    batch = pa.record_batch({"id": [1, 2, 3], "text": text, "nested": nested, "lists": lists, "codes": codes})
    with pa.ipc.new_file(str(tmp_path / "in.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    source = Source.find(str(tmp_path))
    rows = [row for unit in source.units for table in source.tables(unit) for row in to_rows(table, source.schema)]
    assert [(row["id"], row["__read_error"]) for row in rows] == [(1, None), (2, None), (3, None)]
    assert rows[0]["text"] == "a" and rows[2]["lists"] == ["c"]


def test_a_flipped_bit_in_a_footer_of_parquet_ends_no_process(tmp_path: Path) -> None:
    file = tmp_path / "in.parquet"
    pq.write_table(pa.table({"l": [[1, 2], None]}), file)
    data = file.read_bytes()
    footer = range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data) - 8)
    for at, bit in itertools.product(footer, range(4)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        with contextlib.suppress(ConfigError):  # Where the process ends, this test has no result at all.
            Source.find(str(file))


def test_a_pipe_among_the_files_of_an_input_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    for name in ("in.parquet", "in.arrow", "in.csv"):
        os.mkfifo(tmp_path / name)
    for given in ("x.jsonl", "in.parquet", "in.arrow", "in.csv"):
        with pytest.raises(ConfigError, match="is a pipe"):
            Source.find(str(tmp_path / given))


def test_reasons_and_warnings_about_a_file_show_no_key_of_its_address(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "x.jsonl?sig=hunter2"
    (tmp_path / name).write_text('{"a": 1}\n')
    file = base.InputFile(0, Storage.at(tmp_path / name), 9, "")
    list(FORMATS["jsonl"].read(base.Unit(file), pa.schema([("b", pa.string())])))
    assert "are left out: a" in caplog.text and "hunter2" not in caplog.text
    rows = base.error_rows(pa.schema([]), 0, [0], f"{file.path} is damaged").to_pylist()
    assert rows[0]["__read_error"].endswith("x.jsonl?sig=*** is damaged")


def test_a_folder_that_may_not_be_read_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # A test that runs as root may read everything.
    with pytest.raises(ConfigError, match=r"cannot be read: .*Permission denied"):
        Source.find(str(tmp_path))
