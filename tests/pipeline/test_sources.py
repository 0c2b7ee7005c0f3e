"""Finding and looking through input files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from millrace import ConfigError
from millrace.pipeline.sources import READ_ERROR, Source, parse_lines


def write_lines(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_parquet_folders_and_patterns(tmp_path: Path) -> None:
    for index in range(3):
        pq.write_table(pa.table({"id": [index, index]}), tmp_path / f"{index}.parquet")
    (tmp_path / "_SUCCESS").touch()
    assert Source.find(str(tmp_path)).num_rows == 6
    assert len(Source.find(str(tmp_path / "[01].parquet")).paths) == 2
    assert Source.find([str(tmp_path / "0.parquet"), str(tmp_path / "2.parquet")]).schema.names == ["id"]


def test_types_of_json_lines_hold_every_row(tmp_path: Path) -> None:
    rows = [{"a": 1, "m": "x", "n": None}, {"a": 2.5, "m": 3, "c": [1]}, {"a": None, "m": {"k": 1}}]
    source = Source.find(write_lines(tmp_path / "x.jsonl", *rows))
    types = {"a": pa.float64(), "m": pa.string(), "n": pa.string(), "c": pa.list_(pa.int64())}
    assert {field.name: field.type for field in source.schema} == types
    assert source.num_rows == 3


def test_lines_that_are_no_rows_say_so_and_the_others_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"a": 1, "m": "x"}, "{broken", "[1]", {"a": 2, "m": 3})
    source = Source.find(path)
    assert source.num_rows == 4
    lines = [line for line in Path(path).read_text().splitlines() if line]
    rows = parse_lines(pa.table({"text": lines}), source.schema).to_pylist()
    assert [row["a"] for row in rows] == [1, None, None, 2]
    assert [row["m"] for row in rows] == ["x", None, None, "3"]
    assert [row[READ_ERROR] is None for row in rows] == [True, False, False, True]
    assert "not JSON" in rows[1][READ_ERROR]
    assert "JSON list, not an object" in rows[2][READ_ERROR]


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
    ("name", "said"),
    [("missing.parquet", "does not exist"), ("x.txt", "format of"), ("bad.parquet", "cannot be read as parquet")],
)
def test_mistakes_are_said(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=said):
        Source.find(str(tmp_path / name))


def test_a_folder_without_rows_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file of a known kind"):
        Source.find(str(tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_every_format_is_read_as_it_was_looked_at(cluster: None, tmp_path: Path, kind: str) -> None:
    rows = [{"id": index, "line": f"row, {index}"} for index in range(50)]
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        write_lines(path, *rows, "", "{broken")
    source = Source.find(str(path))
    read = source.read().take_all()
    assert len(read) == source.num_rows
    good = [row for row in read if row.pop(READ_ERROR, None) is None]
    assert sorted(good, key=lambda row: row["id"]) == rows
