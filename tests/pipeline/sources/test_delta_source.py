"""Delta tables as input: the rows of one version, and nothing that its log does not name."""

from __future__ import annotations

import base64
import datetime as dt
import json
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace import ConfigError
from millrace.pipeline import JobConfig, columns
from millrace.pipeline.files.storage import StorageOptions
from millrace.pipeline.job.run import prepare_job, prepare_resume
from millrace.pipeline.sources import READ_ERROR, Source
from millrace.pipeline.sources.formats import FORMATS
from s3 import CREDENTIALS, S3Server

deltalake = pytest.importorskip("deltalake")

DAYS = [dt.date(2026, 1, 1), dt.date(2026, 1, 2), None]


def make_table(url: str, **options: Any) -> pa.Table:
    """Makes a table of four versions, with files that count no more; returns its rows."""
    rows = pa.table(
        {
            "id": range(9),
            "line": [f"line {index}" for index in range(9)],
            "day": pa.array([DAYS[index % 3] for index in range(9)], pa.date32()),
            "kind": ["a b/c%é", None, "x=1"] * 3,
        }
    )
    deltalake.write_deltalake(url, rows, partition_by=["day", "kind"], **options)
    deltalake.DeltaTable(url, **options).delete("id = 4")
    deltalake.DeltaTable(url, **options).delete("id = 8 or id = 2 or id = 5")  # A whole partition.
    more = pa.table({"id": [9], "line": ["z"], "day": [DAYS[0]], "kind": ["new"], "score": [0.5]})
    deltalake.write_deltalake(url, more, mode="append", schema_mode="merge", **options)
    return deltalake.DeltaTable(url, **options).to_pyarrow_table()


def read(source: Source) -> pa.Table:
    units = pickle.loads(pickle.dumps(source.units))  # As they come to the workers.
    tables = [table for unit in units for table in FORMATS[source.format].read(unit, source.schema)]
    return pa.concat_tables(tables)


def by_id(table: pa.Table) -> list[dict[str, Any]]:
    return table.sort_by("id").to_pylist()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of several versions."""
    make_table(str(tmp_path / "table"))
    return tmp_path / "table"


@pytest.mark.parametrize("format", [None, "delta", "parquet"])
def test_a_table_is_read_as_its_log_says(tmp_path: Path, format: str | None) -> None:
    expected = make_table(str(tmp_path / "table"))
    source = Source.find(str(tmp_path / "table"), format)
    rows = read(source)
    assert by_id(rows.select(expected.column_names)) == by_id(expected)
    assert [row["id"] for row in by_id(expected)] == [0, 1, 3, 6, 7, 9]
    assert source.schema == expected.schema
    assert (source.num_rows, source.versions) == (6, {str(tmp_path / "table"): 3})
    assert len(set(rows[columns.POSITION].to_pylist())) == 6
    assert rows[READ_ERROR].null_count == 6
    assert read(Source.find(str(tmp_path / "table"))) == rows  # The order is that of the version, not of the moment.


def test_an_old_version_is_read_as_it_was(table: Path) -> None:
    rows = read(Source.find(str(table), versions={str(table): 0}))
    assert rows["id"].to_pylist() != []
    assert sorted(rows["id"].to_pylist()) == list(range(9))
    assert "score" not in rows.column_names


def test_partitions_have_the_types_of_the_table(tmp_path: Path) -> None:
    moment = dt.datetime(2026, 1, 1, 12, 30, tzinfo=dt.UTC)
    rows = pa.table(
        {
            "id": [1, 2],
            "number": pa.array([7, None], pa.int32()),
            "flag": [True, False],
            "at": pa.array([moment, None], pa.timestamp("us", "UTC")),
            "exact": pa.array([None, 1], pa.decimal128(5, 2)),
        }
    )
    names = ["number", "flag", "at", "exact"]
    deltalake.write_deltalake(str(tmp_path / "t"), rows, partition_by=names)
    source = Source.find(str(tmp_path / "t"))
    assert by_id(read(source).select(rows.column_names)) == by_id(rows)
    assert [source.schema.field(name).type for name in names] == [rows.schema.field(name).type for name in names]


@pytest.mark.parametrize("inside", ["day=2026-01-01/*/*.parquet", "**/*.parquet", "day=2026-01-01/kind=new"])
def test_files_of_a_table_are_not_taken_for_its_rows(table: Path, inside: str) -> None:
    with pytest.raises(ConfigError, match=r"finds files of the Delta table '.*/table'; pass the table's folder"):
        Source.find(str(table / inside))


@pytest.mark.parametrize(
    ("path", "format", "said"),
    [
        ("table", "csv", "is a Delta table, whose files are parquet"),
        ("plain", "delta", "is no Delta table: it holds no _delta_log"),
        ("nowhere", "delta", "is no Delta table"),
        ("plain/_delta_log", "delta", "is no Delta table"),
    ],
)
def test_a_folder_that_is_no_table_raises_an_error(table: Path, path: str, format: str, said: str) -> None:
    (table.parent / "plain").mkdir()
    pq.write_table(pa.table({"id": [1]}), table.parent / "plain" / "0.parquet")
    with pytest.raises(ConfigError, match=said):
        Source.find(str(table.parent / path), format)


def test_a_table_without_rows_raises_an_error(tmp_path: Path) -> None:
    deltalake.write_deltalake(str(tmp_path), pa.table({"id": pa.array([], pa.int64())}))
    with pytest.raises(ConfigError, match="holds no rows at version 0"):
        Source.find(str(tmp_path))


def test_a_log_that_cannot_be_read_raises_an_error_of_one_line(table: Path) -> None:
    (table / "_delta_log" / f"{1:020}.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        Source.find(str(table))
    assert "\n" not in str(caught.value)


def test_without_the_library_the_extra_is_named(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(ConfigError, match=r"pip install 'millrace\[delta\]'"):
        Source.find(str(table))


def rewrite_log(table: Path, protocol: dict[str, Any], **changes: dict[str, Any]) -> None:
    """Adds a version with another protocol, and with changes to the actions of the one before."""
    log = table / "_delta_log"
    before = [json.loads(line) for line in (log / f"{0:020}.json").read_text().splitlines()]
    actions = [{name: {**action[name], **changes[name]}} for action in before for name in action if name in changes]
    (log / f"{1:020}.json").write_text("\n".join(json.dumps(one) for one in [{"protocol": protocol}, *actions]))


def deletion_vector(*rows: int) -> dict[str, Any]:
    """Returns what a log says of deleted rows, numbers below 65536, in itself: a bitmap in the encoding of ZeroMQ."""
    bitmap = struct.pack("<IIHHI", 12346, 1, 0, len(rows) - 1, 16) + struct.pack(f"<{len(rows)}H", *rows)
    data = struct.pack("<IQI", 1681511377, 1, 0) + bitmap
    text = base64.b85encode(data + bytes(-len(data) % 4)).decode()
    ours = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
    theirs = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
    inline = text.translate(str.maketrans(ours, theirs))
    return {"storageType": "i", "pathOrInlineDv": inline, "sizeInBytes": len(data), "cardinality": len(rows)}


def features(*names: str) -> dict[str, Any]:
    return {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": names, "writerFeatures": names}


MAPPED = {"configuration": {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "1"}}


@pytest.mark.parametrize(
    ("protocol", "changes", "said"),
    [
        (features("deletionVectors"), {"add": {"deletionVector": deletion_vector(1)}}, "deletion vectors"),
        (features("columnMapping"), {"metaData": MAPPED}, "column mapping"),
        ({"minReaderVersion": 2, "minWriterVersion": 5}, {"metaData": MAPPED}, "column mapping"),
        (features("somethingNew"), {}, "somethingNew"),
    ],
)
def test_a_table_whose_files_are_not_its_rows_is_refused(
    tmp_path: Path, protocol: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    deltalake.write_deltalake(str(tmp_path), pa.table({"id": range(5)}))
    if "metaData" in changes:
        field = {"name": "id", "type": "long", "nullable": True}
        ids = {"delta.columnMapping.id": 1, "delta.columnMapping.physicalName": "id"}
        schema = {"type": "struct", "fields": [{**field, "metadata": ids}]}
        changes = {"metaData": {**MAPPED, "schemaString": json.dumps(schema)}}
    rewrite_log(tmp_path, protocol, **changes)
    with pytest.raises(ConfigError, match=said) as caught:
        Source.find(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_feature_that_no_file_uses_does_not_matter(tmp_path: Path) -> None:
    deltalake.write_deltalake(str(tmp_path), pa.table({"id": range(5)}))
    rewrite_log(tmp_path, features("deletionVectors", "columnMapping"))
    assert read(Source.find(str(tmp_path)))["id"].to_pylist() == list(range(5))


@pytest.fixture
def job(table: Path, model_folder: Path) -> JobConfig:
    """A job on the table."""
    return JobConfig(model=str(model_folder), input=str(table), output=str(table.parent / "out"), prompt="{line}")


def test_a_job_that_goes_on_reads_the_version_it_began_with(job: JobConfig, table: Path) -> None:
    prepared = prepare_job(job)
    prepared.folder.write_state(prepared.state)
    deltalake.write_deltalake(str(table), pa.table({"id": [99], "line": ["late"]}), mode="append", schema_mode="merge")
    deltalake.DeltaTable(str(table)).delete("id < 2")
    for later in (prepare_job(job), prepare_resume(job.output)):
        assert later.resumes
        assert later.source is not None
        assert prepared.source is not None
        assert later.source.versions == {str(table): 3}
        assert read(later.source) == read(prepared.source)
    fresh = prepare_job(job, overwrite=True)
    assert fresh.source is not None
    assert (fresh.source.versions, fresh.num_rows_in) == ({str(table): 5}, 5)


def test_a_version_whose_files_are_gone_raises_an_error(job: JobConfig, table: Path) -> None:
    prepared = prepare_job(job)
    prepared.folder.write_state(prepared.state)
    delta = deltalake.DeltaTable(str(table))
    delta.delete("id < 2")
    delta.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    with pytest.raises(ConfigError, match=r"version 3 cannot be read.*VACUUM"):
        prepare_resume(job.output)


def test_a_table_in_a_bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    url = f"s3://{s3.make_bucket()}/lake/table"
    expected = make_table(url, storage_options={"AWS_ENDPOINT_URL": s3.url, "AWS_ALLOW_HTTP": "true"})
    by_environment = Source.find(url)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    by_setting = Source.find(url, options=StorageOptions(s3.url))
    for source in (by_environment, by_setting):
        assert by_id(read(source).select(expected.column_names)) == by_id(expected)
    with pytest.raises(ConfigError, match="finds files of the Delta table"):
        Source.find(f"{url}/**/*.parquet", options=StorageOptions(s3.url))
