"""Files here and in a bucket: the same calls, a store that fails now and then, and mistakes that are said at once."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from fault_proxy import FaultPlan, FaultProxy
from millrace import ConfigError
from millrace.engine.errors import DamagedOutputError, StorageError
from millrace.pipeline import columns
from millrace.pipeline.files.storage import Storage, StorageOptions
from millrace.pipeline.sources import READ_ERROR, Source
from millrace.pipeline.sources.formats import FORMATS
from s3 import CREDENTIALS, S3Server

DEADLINE_S = 240.0
WRITERS: dict[str, Callable[[pa.Table, Any], Any]] = {
    "parquet": pq.write_table,
    "jsonl": lambda table, sink: sink.write("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()),
    "csv": pyarrow.csv.write_csv,
    "arrow": lambda table, sink: pa.ipc.new_stream(sink, table.schema).write_table(table),
}
ENGINE = {"max_num_seqs": 32, "max_model_len": 128, "num_threads": 1}


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A folder that does not exist yet, here or in a bucket."""
    if request.param == "local":
        return Storage.at(tmp_path / "folder")
    server: S3Server = request.getfixturevalue("s3")
    return Storage.at(f"s3://{server.make_bucket()}/folder", server.url)


@pytest.fixture
def broken(s3: S3Server) -> Iterator[FaultProxy]:
    """A proxy before the server, through which a quarter of the requests fails."""
    with FaultProxy(s3.host, s3.port, FaultPlan(seed=6)) as proxy:
        yield proxy


def options(proxy: FaultProxy) -> StorageOptions:
    """Settings under which a stall costs half a second. Real ones are longer, nothing else is different."""
    return StorageOptions(proxy.url, read_timeout_s=0.5)


def test_a_folder_is_written_listed_and_removed(folder: Storage) -> None:
    assert (folder.exists(), folder.is_dir(), folder.list(), folder.walk()) == (False, False, [], [])
    content = bytes(range(256)) * 40
    file = folder / "b.bin"
    file.write_bytes(content)
    (folder / "sub" / "c.txt").write_bytes(b"")
    assert (folder.is_dir(), file.is_dir(), file.size(), file.read_bytes()) == (True, False, len(content), content)
    assert [one.name for one in folder.list()] == ["b.bin", "sub"]
    assert [one.name for one in folder.list(".bin")] == ["b.bin"]
    assert folder.walk() == [file, folder / "sub" / "c.txt"]
    assert (folder / "sub" / "c.txt").read_bytes() == b""
    etag = file.etag()
    file.write_bytes(content + b"more")
    assert file.etag() != etag
    file.move_to(folder / "d.bin")
    assert [one.name for one in folder.list()] == ["d.bin", "sub"]
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    folder.remove()
    folder.remove()
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a[1]", "a?", "a*"])
def test_a_name_is_no_pattern_when_it_is_removed(folder: Storage, name: str) -> None:
    for other in (name, "a1", f"{name}.d/x", "a1.d/x"):
        (folder / other).write_bytes(b"1")
    (folder / name).remove()
    (folder / f"{name}.d").remove()
    assert sorted(file.url.removeprefix(folder.url).strip("/") for file in folder.walk()) == ["a1", "a1.d/x"]


def test_files_are_read_at_any_place_by_python_and_by_arrow(folder: Storage) -> None:
    table = pa.table({"id": range(1000)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=100)
    file = pickle.loads(pickle.dumps(folder / "x.parquet"))
    file.write_bytes(sink.getvalue().to_pybytes())
    with file.open_input() as opened:
        opened.seek(-4, os.SEEK_END)
        assert opened.read() == b"PAR1"
    with file.open_arrow() as opened:
        assert pq.ParquetFile(opened).read_row_group(3)["id"].to_pylist() == list(range(300, 400))
    filesystem, path = file.filesystem()
    assert pq.read_table(path, filesystem=filesystem) == table


def test_a_local_file_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Storage.at(tmp_path / "x")
    file.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        file.write_bytes(b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_of_several_creators_of_a_file_one_makes_it(folder: Storage) -> None:
    contents = [f"{index}".encode() for index in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        made = list(threads.map((folder / "x").create, contents))
    assert sum(made) == 1
    assert (folder / "x").read_bytes() == contents[made.index(True)]
    assert [one.name for one in folder.list()] == ["x"]


def test_a_creation_whose_answer_is_lost_is_not_taken_for_that_of_another(s3: S3Server, broken: FaultProxy) -> None:
    root = Storage.at(f"s3://{s3.make_bucket()}/data", options=options(broken))
    assert all((root / str(index)).create(os.urandom(10)) for index in range(16))
    assert not (root / "3").create(b"other")


def test_a_file_is_created_once_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", link)
    assert [Storage.at(tmp_path / "x").create(data) for data in (b"1", b"2")] == [True, False]
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_store_that_cannot_create_a_file_once_warns(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    file = Storage.at(f"local://{tmp_path}/x")
    assert [file.create(data) for data in (b"1", b"2")] == [True, False]
    assert "never start two runs of one output" in caplog.text


def test_a_rename_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    whole = os.fsync

    def fsync(number: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        whole(number)

    monkeypatch.setattr(os, "fsync", fsync)
    file = Storage.at(tmp_path / "a" / "x")
    file.write_bytes(b"1")
    assert {str(tmp_path), str(tmp_path / "a")} <= set(synced)
    synced.clear()
    file.move_to(Storage.at(tmp_path / "b" / "x"))
    assert {str(tmp_path / "a"), str(tmp_path / "b")} <= set(synced)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".", "a//b", "s3://b/x", "a\\b", "a\0b"])
def test_a_name_that_leads_out_of_a_folder_is_refused(folder: Storage, name: str) -> None:
    with pytest.raises(DamagedOutputError, match="not inside that folder"):
        folder.inside(name)
    assert folder.inside("a/b.parquet") == folder / "a" / "b.parquet"


def test_bytes_sent_through_a_broken_store_arrive(s3: S3Server, broken: FaultProxy) -> None:
    root = Storage.at(f"s3://{s3.make_bucket()}/data", options=options(broken))
    contents = {f"{index:02}.bin": os.urandom(20_000) for index in range(16)}

    def there_and_back(name: str) -> bool:
        (root / "draft" / name).write_bytes(contents[name])
        (root / "draft" / name).move_to(root / name)
        with (root / name).open_input(4096) as file:
            pieces = iter(lambda: file.read(7000), b"")
            return b"".join(pieces) == contents[name] == (root / name).read_bytes()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, contents))
    assert [one.name for one in root.list()] == sorted(contents)
    assert set(broken.counts) == {*broken.plan.faults, "none"}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_every_row_is_read_once_through_a_broken_store(s3: S3Server, broken: FaultProxy, kind: str) -> None:
    root = Storage.at(f"s3://{s3.make_bucket()}/in", s3.url)
    for part in range(2):
        rows = [{"id": 1000 * part + index, "line": "x" * 50} for index in range(1000)]
        sink = pa.BufferOutputStream()
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=200)
        else:
            sink.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        (root / f"{part}.{kind}").write_bytes(sink.getvalue().to_pybytes())
    source = Source.find(f"{root.url}/*.{kind}", options=options(broken))
    tables = [table for unit in source.units for table in FORMATS[kind].read(unit, source.schema)]
    read = pa.concat_tables(tables)
    assert read["id"].to_pylist() == list(range(2000))
    assert len(set(read[columns.POSITION].to_pylist())) == 2000
    assert read[READ_ERROR].null_count == 2000
    assert broken.counts.total() > broken.counts["none"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "arrow"])
def test_a_store_that_goes_away_is_not_taken_for_a_damaged_file(s3: S3Server, kind: str) -> None:
    with FaultProxy(s3.host, s3.port, FaultPlan(rate=0)) as proxy:
        file = Storage.at(f"s3://{s3.make_bucket()}/x.{kind}", options=StorageOptions(proxy.url, max_attempts=2))
        sink = pa.BufferOutputStream()
        WRITERS[kind](pa.table({"id": range(100)}), sink)
        file.write_bytes(sink.getvalue().to_pybytes())
        source = Source.find(file.url, options=file.options)
        proxy.plan = FaultPlan(rate=1.0, faults=("503",))
        with pytest.raises(StorageError, match="after 2 attempts"):
            list(FORMATS[kind].read(source.units[0], source.schema))


def test_arrow_reads_and_writes_through_a_broken_store(s3: S3Server, broken: FaultProxy) -> None:
    root = Storage.at(f"s3://{s3.make_bucket()}/data", options=options(broken))
    tables = [pa.table({"id": range(1000 * part, 1000 * part + 1000)}) for part in range(5)]
    filesystem, path = pickle.loads(pickle.dumps(root.filesystem()))
    for part, table in enumerate(tables):
        pq.write_table(table, f"{path}/{part}.parquet", filesystem=filesystem)
    assert pq.read_table(path, filesystem=filesystem) == pa.concat_tables(tables)
    filesystem.move(f"{path}/0.parquet", f"{path}/sub/0.parquet")
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    assert sorted(info.base_name for info in found) == [f"{part}.parquet" for part in range(5)]
    assert filesystem.get_file_info(f"{path}/0.parquet").type == pyarrow.fs.FileType.NotFound
    filesystem.delete_dir(path)
    assert not root.exists()


def test_a_store_that_always_fails_is_given_up(s3: S3Server) -> None:
    with FaultProxy(s3.host, s3.port, FaultPlan(rate=1.0, faults=("503",))) as proxy:
        file = Storage.at("s3://bucket/x", options=StorageOptions(proxy.url, max_attempts=3))
        with pytest.raises(StorageError, match="cannot look at s3://bucket/x after 3 attempts"):
            file.read_bytes()
        assert proxy.counts == {"503": 3}


@pytest.mark.parametrize("action", ["exists", "list", "walk", "read_bytes", "write_bytes", "remove"])
def test_a_missing_bucket_is_an_error_without_retries(s3: S3Server, action: str) -> None:
    with FaultProxy(s3.host, s3.port, FaultPlan(rate=0)) as proxy:
        file = Storage.at("s3://no-such-bucket/x", proxy.url)
        call: Callable[..., Any] = getattr(file, action)
        with pytest.raises(ConfigError, match="the bucket 'no-such-bucket' does not exist"):
            call(*([b"x"] if action == "write_bytes" else []))
        assert proxy.counts.total() <= 2


def test_missing_credentials_are_an_error_without_retries(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull)
    # Other settings than those of other tests, whose connections have found credentials.
    with pytest.raises(ConfigError, match=r"no credentials .*AWS_ACCESS_KEY_ID") as caught:
        Storage.at("s3://bucket/x", options=StorageOptions(s3.url, read_timeout_s=29)).read_bytes()
    assert "\n" not in str(caught.value)


def test_wrong_credentials_are_an_error_without_retries(s3: S3Server) -> None:
    with FaultProxy(s3.host, s3.port, FaultPlan(rate=1.0, faults=("403",))) as proxy:
        for action in ("read_bytes", "list"):
            with pytest.raises(ConfigError, match=r"access denied .*check the credentials"):
                getattr(Storage.at("s3://bucket/x", proxy.url), action)()
        assert proxy.counts == {"403": 2}


def test_the_endpoint_may_come_from_the_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.make_bucket()
    Storage.at(f"s3://{bucket}/x", s3.url).write_bytes(b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url)
    assert Storage.at(f"s3://{bucket}/x", options=StorageOptions(read_timeout_s=28)).read_bytes() == b"x"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gs://bucket/x", "pip install gcsfs"),
        ("abfss://container@account.dfs.core.windows.net/x", "pip install adlfs"),
        ("nosuch://x", "nosuch:// is not known"),
    ],
)
def test_a_library_that_is_not_installed_is_named(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Storage.at(url).exists()


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="endpoint_url must begin with http"):
        StorageOptions("minio:9000")
    with pytest.raises(ConfigError, match="max_attempts must be greater than 0"):
        StorageOptions(max_attempts=0)
    monkeypatch.setenv("MILLRACE_STORAGE_TIMEOUT_S", "soon")
    with pytest.raises(ConfigError, match=r"MILLRACE_STORAGE_TIMEOUT_S must be a number of seconds; got 'soon'"):
        StorageOptions()


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, with credentials and nothing else of AWS."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    command = [sys.executable, "-P", "-c", "from millrace.pipeline.cli import main; main()", *arguments]
    return subprocess.run(
        command,
        env={**clean, **CREDENTIALS, "MILLRACE_STORAGE_TIMEOUT_S": "0.5", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )


@pytest.mark.slow
def test_a_job_from_bucket_to_bucket_loses_nothing(s3: S3Server, tiny_model: Callable[[str], Path]) -> None:
    bucket = s3.make_bucket()
    root = Storage.at(f"s3://{bucket}", s3.url)
    for path in tiny_model("llama").iterdir():
        (root / "model" / path.name).write_bytes(path.read_bytes())
    lines = [json.dumps({"id": index, "line": f"line {index}"}) for index in range(300)]
    (root / "in" / "rows.jsonl").write_bytes("\n".join([*lines, "{broken", '{"id": 301, "line": null}']).encode())
    with FaultProxy(s3.host, s3.port, FaultPlan(seed=8, rate=0.12)) as proxy:
        done = run_cli(
            *("run", "--model", f"s3://{bucket}/model", "--input", f"s3://{bucket}/in/*.jsonl"),
            *("--output", f"s3://{bucket}/out", "--prompt", "{line}", "--max-tokens", "4"),
            *(item for name, value in ENGINE.items() for item in ("--set", f"engine.{name}={value}")),
            AWS_ENDPOINT_URL=proxy.url,
        )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert set(proxy.counts) == {*proxy.plan.faults, "none"}
    out = root / "out"
    manifest = json.loads((out / "_manifest.json").read_bytes())
    assert manifest
    written = [pq.read_table(file.open_arrow()) for file in out.list(".parquet")]
    failed = [pq.read_table(file.open_arrow()) for file in (out / "_failed").list(".parquet")]
    ids = [one for table in written for one in table["id"].to_pylist()]
    assert sorted(ids) == list(range(300))
    assert sorted(str(one) for table in failed for one in table["id"].to_pylist()) == ["301", "None"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials"), ({}, "bucket 'no-such-bucket' does")],
    ids=["credentials", "bucket"],
)
def test_the_command_line_shows_a_mistake_in_one_line(s3: S3Server, environment: dict[str, str], said: str) -> None:
    names = {"AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_CONFIG_FILE": os.devnull}
    arguments = ("run", "--model", "bundled:invoices", "--input", "s3://no-such-bucket/in.jsonl", "--prompt", "{line}")
    done = run_cli(*arguments, "--output", "out", AWS_ENDPOINT_URL=s3.url, **names, **environment)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert said in line
