"""Large files that appear whole, here and in a store; the folder that tells one batch from another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace import ConfigError
from millrace.engine.errors import DamagedOutputError, OutputInUseError
from millrace.engine.storage import RemoteFiles, StorageOptions, retries
from millrace.pipeline import columns
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.openai_batch import output_file
from millrace.pipeline.openai_batch.assemble import write_answers, write_errors
from millrace.pipeline.openai_batch.batch_config import BatchConfig
from millrace.pipeline.openai_batch.folder import BatchFolder
from millrace.pipeline.openai_batch.lines.request import RequestReader
from millrace.pipeline.openai_batch.output_file import remove_drafts, whole_file


@pytest.fixture(params=["here", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A folder here, one in S3, and one in a store that knows no pieces."""
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    return Storage.at(tmp_path / "sub" if request.param == "here" else f"memory://{tmp_path.name}")


def test_a_file_appears_with_all_its_pieces(place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_file, "PIECE_BYTES", 5 << 20)
    data = [bytes([at]) * (3 << 20) for at in range(5)]
    with whole_file(place / "a.jsonl") as file:
        for piece in data:
            file.write(piece)
            assert not (place / "a.jsonl").exists()
    assert (place / "a.jsonl").read_bytes() == b"".join(data)
    assert [one.name for one in place.list()] == ["a.jsonl"]


def test_an_empty_file_is_a_file(place: Storage) -> None:
    with whole_file(place / "a.jsonl"):
        pass
    assert (place / "a.jsonl").size() == 0


def test_a_file_that_failed_is_not_there(place: Storage) -> None:
    def write() -> None:
        with whole_file(place / "a.jsonl") as file:
            file.write(b"x")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert list(place.list()) == []


def test_what_a_killed_process_left_of_a_file_is_removed_and_nothing_else(
    place: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["b.jsonl", ".a.jsonl.0123.tmp", ".b.jsonl.0123456789ab.tmp"]
    for name in kept:
        (place / name).write_bytes(b"x")
    with monkeypatch.context() as killed:
        killed.setattr(Storage, "remove", lambda one: None)
        killed.setattr(output_file.S3Upload, "abort", lambda upload: None)
        killed.setattr(Storage, "move_to", lambda one, other: None)
        killed.setattr(output_file.S3Upload, "finish", lambda upload: None)
        with whole_file(place / "a.jsonl") as file:
            file.write(b"x")
    remove_drafts(place / "a.jsonl")
    assert sorted(one.name for one in place.list()) == sorted(kept)
    if place.protocol == "s3":
        library = RemoteFiles("s3", place.options).library
        assert "Uploads" not in library.call_s3("list_multipart_uploads", Bucket=place.name)


def test_a_store_that_fails_once_gets_the_file_again(monkeypatch: pytest.MonkeyPatch) -> None:
    library, failures = RemoteFiles("memory", StorageOptions()).library, [ConnectionError("reset")]
    put = library.put_file

    def put_file(*args: Any) -> None:
        put(*args)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(library, "put_file", put_file)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    target = Storage.at("memory://fails-once/a.jsonl")
    with whole_file(target) as file:
        file.write(b"x" * 100_000)
    assert target.size() == 100_000
    assert [one.name for one in Storage.at("memory://fails-once").list()] == ["a.jsonl"]


def test_a_file_appears_only_if_the_process_may_still_write_it(tmp_path: Path) -> None:
    def check() -> None:
        raise OutputInUseError("another run has taken over")

    with pytest.raises(OutputInUseError):
        write_answers([part(tmp_path, "0.parquet", [{"line": b"1\n"}])], Storage.at(tmp_path / "out"), check)
    assert [one.name for one in tmp_path.iterdir()] == ["0.parquet"]


def may_write() -> None:
    """The check of a process that may write its files."""


def part(folder: Path, name: str, rows: list[dict[str, Any]]) -> Storage:
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return Storage.at(folder / name)


def test_answers_and_errors_are_in_the_order_of_the_input(tmp_path: Path) -> None:
    answers = [part(tmp_path, f"{at}.parquet", [{"line": b"%d\n" % at}]) for at in range(3)]
    assert write_answers(answers, Storage.at(tmp_path / "out"), may_write) == 3
    assert (tmp_path / "out").read_bytes() == b"0\n1\n2\n"

    def dead(number: int) -> dict[str, Any]:
        row = {"line": b"{", "line_number": number, "is_duplicate": False, columns.ROW_ID: number.to_bytes(12, "big")}
        return {**row, columns.ERROR_KIND: "BatchLineError", columns.ERROR_MESSAGE: "x"}

    failed = [part(tmp_path, "a.parquet", [dead(1), dead(4)]), part(tmp_path, "b.parquet", [dead(2), dead(3)])]
    codes = write_errors(failed, Storage.at(tmp_path / "errors"), RequestReader(("m",)), may_write)
    assert {code: one.num_rows for code, one in codes.items()} == {"invalid_json_line": 4}
    lines = (tmp_path / "errors").read_text().splitlines()
    assert [f'"line":{number}' in line for number, line in enumerate(lines, start=1)] == [True] * 4


def config(folder: Path, **changes: Any) -> BatchConfig:
    if not (folder / "in.jsonl").exists():
        (folder / "in.jsonl").write_text("{}\n")
    fields = {"model": "m", "input": str(folder / "in.jsonl"), "output": str(folder / "out.jsonl"), **changes}
    return BatchConfig(**fields)


def test_files_have_their_names_from_the_out_file(tmp_path: Path) -> None:
    batch = config(tmp_path)
    assert batch.error_file.url == str(tmp_path / "out.errors.jsonl")
    assert batch.work_folder.url == str(tmp_path / ".out.jsonl.millrace")
    assert config(tmp_path, output="s3://b/out").error_file.url == "s3://b/out.errors"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input": "in.jsonl.gz"}, "unpack it first"),
        ({"input": "a.jsonl", "output": "./a.jsonl"}, "input and output are both"),
        ({"errors": "out.jsonl", "output": "out.jsonl"}, "output and errors are both"),
        ({"max_tokens": 0}, "BatchConfig.max_tokens"),
        ({"modell": "m"}, "did you mean 'model'?"),
    ],
)
def test_a_mistake_in_the_settings_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        config(tmp_path, **changes)


def test_only_the_owner_reads_the_settings_of_a_batch(tmp_path: Path) -> None:
    batch = BatchFolder(config(tmp_path))
    batch.begin()
    (state,) = (one for one in batch.root.list() if one.name == "batch.json")
    assert Path(state.url).stat().st_mode & 0o777 == 0o600


def test_a_batch_that_has_begun_goes_on_unless_it_is_another(tmp_path: Path) -> None:
    assert not BatchFolder(config(tmp_path)).check(overwrite=False)
    BatchFolder(config(tmp_path)).begin()
    assert BatchFolder(config(tmp_path, replicas=2)).check(overwrite=False)
    with pytest.raises(ConfigError, match=r"max_tokens was None and is now 5.*--overwrite"):
        BatchFolder(config(tmp_path, max_tokens=5)).check(overwrite=False)
    assert not BatchFolder(config(tmp_path, max_tokens=5)).check(overwrite=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "\ud800", "[" * 100_000])
def test_a_damaged_description_of_a_batch_is_said(tmp_path: Path, text: str) -> None:
    batch = BatchFolder(config(tmp_path))
    batch.begin()
    (batch.root / "batch.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"batch\.json' (is damaged|describes no batch).*--overwrite"):
        batch.check(overwrite=False)
    assert not batch.check(overwrite=True)


def test_a_folder_that_a_stranger_links_elsewhere_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    batch = BatchFolder(config(tmp_path))
    Path(batch.root.url).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedOutputError, match="is a link"):
        batch.check(overwrite=False)
    Path(batch.root.url).unlink()
    Path(batch.root.url).symlink_to("/")
    with pytest.raises(DamagedOutputError, match="not inside that folder"):
        batch.check(overwrite=False)


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    batch = BatchFolder(config(tmp_path))
    batch.begin()
    whole = batch.index().to_bytes()
    for data in (b"", b"x" * 100, whole[:-30], whole.replace(b"chunks", b"chunkz")):
        (batch.root / "index.npz").write_bytes(data)
        assert batch.index().num_rows == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_never_replaced_by_a_file(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out.jsonl").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        BatchFolder(config(tmp_path)).check(overwrite)


def test_files_that_are_there_are_replaced_only_if_told(tmp_path: Path) -> None:
    (tmp_path / "out.errors.jsonl").touch()
    batch = BatchFolder(config(tmp_path))
    with pytest.raises(ConfigError, match=r"out\.errors\.jsonl' is there already"):
        batch.check(overwrite=False)
    assert not batch.check(overwrite=True)
    batch.begin()
    assert not (tmp_path / "out.errors.jsonl").exists()


def test_a_missing_input_is_said(tmp_path: Path) -> None:
    batch = config(tmp_path)
    (tmp_path / "in.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"in\.jsonl' does not exist"):
        BatchFolder(batch).check(overwrite=False)
