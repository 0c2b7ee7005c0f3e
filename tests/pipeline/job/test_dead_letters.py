"""Rows as a job makes them of its input, and once more of its dead letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from millrace.pipeline import JobConfig, columns
from millrace.pipeline.job.dead_letters import dead_letters
from millrace.pipeline.job.durable import Identity, PrepareNew
from millrace.pipeline.job.rows import MakePrompt
from millrace.pipeline.job.run import PreparedJob, prepare_job
from millrace.pipeline.processor.operators import unpack
from millrace.pipeline.sinks.formats import FORMATS
from millrace.pipeline.sinks.manifest import OutputFile
from millrace.pipeline.sinks.tables import Finished, failed_tables
from millrace.pipeline.stages.base import Row, RowError
from millrace.pipeline.stages.user_function import PreprocessStage

FAILED = RowError("generate", "EngineError", "it failed")


def prepare(tmp_path: Path, model: Path, name: str, prompt: str) -> PreparedJob:
    return prepare_job(
        JobConfig(model=str(model), input=str(tmp_path / name), output=str(tmp_path / "out"), prompt=prompt)
    )


def rows_of(prepared: PreparedJob, tables: Any = None, identity: Identity | None = None) -> list[Row]:
    """Returns the rows of the input of a job, or of other tables, with their prompts."""
    if tables is None:
        assert prepared.source is not None
        tables = [table for unit in prepared.source.units for table in prepared.source.tables(unit)]
    stages = [PreprocessStage(MakePrompt.of(prepared.job))]
    schema = prepared.spec.input_schema
    new = PrepareNew(lambda: stages, identity or prepared.identity, prepared.folder.work, (), schema=schema)
    return [row for table in tables for row in unpack(new(table))]


def run_again(prepared: PreparedJob, rows: list[Row]) -> list[Row]:
    """Writes rows as dead letters, and returns the rows that the letters become."""
    finished = [Finished(row.data[columns.ROW_ID], row, row) for row in rows]
    files = []
    for at, (group, table) in enumerate(failed_tables(finished, prepared.spec.input_schema)):
        file = prepared.folder.root / f"{at}.parquet"
        file.write_bytes(FORMATS["parquet"].encode(table))
        files.append(OutputFile(file.name, len(group), file.size()))
    assert prepared.spec.input_schema is not None
    letters = dead_letters(prepared.folder.root, files, prepared.spec.input_schema)
    tables = [table for task in letters.get_read_tasks(1) for table in task()]
    return rows_of(prepared, tables, Identity(column=columns.ROW_ID))


def test_a_struct_of_parquet_has_no_nulls_for_the_keys_of_other_rows(tmp_path: Path, model_folder: Path) -> None:
    metas = pa.array([{"a": 1, "in": [{"x": 1}, {"y": 2}]}, {"b": 3}, {"a": None}, None])
    pq.write_table(pa.table({"meta": metas}), tmp_path / "in.parquet")
    rows = rows_of(prepare(tmp_path, model_folder, "in.parquet", "{meta}"))
    assert [row.data.get("prompt") for row in rows] == ['{"a": 1, "in": [{"x": 1}, {"y": 2}]}', '{"b": 3}', "{}", None]
    assert pa.array([row.input["meta"] for row in rows], metas.type).equals(metas)


@pytest.mark.parametrize("text", ["12", "{}", '"x"', "null", "{", "plain", "\ud800", "é"])
def test_a_dead_letter_runs_again_as_it_was_read(tmp_path: Path, model_folder: Path, text: str) -> None:
    values = [text, {"a": [1.5, None]}, {}, {"\ud800": "é"}, None]
    lines = [{"meta": value, "text": "12"} for value in values]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepared = prepare(tmp_path, model_folder, "in.jsonl", "{text}")
    rows = rows_of(prepared)
    for row in rows:
        row.error = FAILED
    again = run_again(prepared, rows)
    assert [{name: row.input[name] for name in ("meta", "text")} for row in again] == lines
    assert [row.data["prompt"] for row in again] == ["12"] * len(lines)


def test_files_of_dead_letters_may_differ_in_type(tmp_path: Path, model_folder: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3], "line": ["x", "y", "z"]}), tmp_path / "in.parquet")
    prepared = prepare(tmp_path, model_folder, "in.parquet", "{line}")
    rows = rows_of(prepared)
    for row in rows:
        row.error = FAILED
    rows[1].input["id"] = {"no": "integer"}
    good, other, bad = sorted(run_again(prepared, rows), key=lambda row: row.error is not None)
    assert [(row.input["id"], row.data["prompt"]) for row in (good, other)] == [(1, "x"), (3, "z")]
    assert bad.error is not None
    assert "column 'id' holds {'no': 'integer'}, which is not int64" in bad.error.message


def test_a_category_that_is_no_text_runs_again(tmp_path: Path, model_folder: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"a"]).buffers())
    table = pa.table({"id": [1, 2], "kind": pa.DictionaryArray.from_arrays(pa.array([0, 1]), bad)})
    with pyarrow.ipc.new_file(str(tmp_path / "in.arrow"), table.schema) as writer:
        writer.write_table(table)
    prepared = prepare(tmp_path, model_folder, "in.arrow", "{id}")
    rows = rows_of(prepared)
    for row in rows:
        row.error = FAILED
    assert [(row.input["id"], str(row.input["kind"])) for row in run_again(prepared, rows)] == [(1, "\\xff"), (2, "a")]


def test_a_piece_that_was_no_row_is_none_when_it_runs_again(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1}\n[2]\n')
    prepared = prepare(tmp_path, model_folder, "in.jsonl", "{id}")
    first = rows_of(prepared)
    first[0].error = FAILED
    good, bad = run_again(prepared, first)
    assert (good.error, good.data["prompt"]) == (None, "1")
    assert bad.error == first[1].error
    assert bad.input["__read_row"] == "[2]"
