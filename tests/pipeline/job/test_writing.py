"""Datasets into files, on Ray."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray.data

from millrace import ConfigError, Processor, write_results
from millrace.engine.errors import OutputInUseError
from millrace.pipeline.job import writing
from millrace.pipeline.sources import Source

Make = Callable[..., Processor]


def keep(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "text": row["generated_text"]}


def test_a_dataset_with_a_key_is_written_once(
    cluster: None, make_processor: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"id": f"r{index}", "prompt": "fail" if index == 7 else f"row {index % 3}"} for index in range(60)]
    processor, out = make_processor(postprocess=keep), str(tmp_path / "out")
    manifest = write_results(processor, ray.data.from_items([*rows, rows[5]]), out, key=["id"])
    assert (manifest.num_rows, manifest.num_failed) == (59, 1)
    assert "1 rows have the same values of id as others and were left out" in caplog.text
    table = pq.read_table(out)
    assert sorted(table["id"].to_pylist()) == sorted(row["id"] for row in rows if row["prompt"] != "fail")
    assert set(table["text"].to_pylist()) == {"ROW 00", "ROW 10", "ROW 20"}
    assert table.column_names == ["id", "text"]
    (letter,) = pq.read_table(tmp_path / "out" / "_failed").to_pylist()
    assert (letter["id"], letter["prompt"], letter["__error_kind"]) == ("r7", "fail", "NumericalError")
    # Of three prompts one each ran, whichever blocks they were in.
    assert manifest.counts.num_duplicates == 59 - 3
    assert write_results(processor, ray.data.from_items(rows), out, key=["id"]) == manifest
    with pytest.raises(ConfigError, match=r'holds a finished job that is another one: key was \["id"\] and is now'):
        write_results(processor, ray.data.from_items(rows), out, key=["prompt"])


def test_of_two_calls_at_the_same_moment_one_is_refused_with_who_holds_the_output(
    make_processor: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row runs: the call that holds the output waits until the other one is refused."""
    together, refused = threading.Barrier(2), threading.Event()
    ends: list[str] = []

    def call() -> None:
        together.wait()
        try:
            write_results(make_processor(), dataset, str(tmp_path / "out"), key=["id"])  # type: ignore[arg-type]
            ends.append("written")
        except OutputInUseError as error:
            ends.append(str(error))
            refused.set()

    dataset = SimpleNamespace(columns=lambda: ["id"])
    monkeypatch.setattr(writing, "write_rows", lambda *args: refused.wait(60))
    monkeypatch.setattr(writing, "publish", lambda *args: None)
    threads = [threading.Thread(target=call) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    said, written = sorted(ends)
    assert written == "written" and f"{str(tmp_path / 'out')!r}: process {os.getpid()} on " in said


def test_lines_of_a_file_keep_their_order(cluster: None, make_processor: Make, tmp_path: Path) -> None:
    lines = [json.dumps({"id": index, "prompt": f"row {index}"}) for index in range(200)]
    lines[50] = "{broken"
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    dataset = Source.find(str(tmp_path / "in.jsonl")).read()
    out = tmp_path / "out"
    manifest = write_results(
        make_processor(postprocess=keep), dataset, str(out), order="input", output_format="jsonl", max_rows_per_file=64
    )
    read = [json.loads(line) for one in manifest.files for line in (out / one.name).read_text().splitlines()]
    assert [row["id"] for row in read] == [index for index in range(200) if index != 50]
    assert [one.num_rows for one in manifest.files] == [64, 64, 64, 7]
    (letter,) = pq.read_table(out / "_failed").to_pylist()
    assert letter["__error_stage"] == "read"
    assert "{broken" in letter["__error_message"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "pass key="),
        ({"key": ["id"], "output_format": "xml"}, "output_format must be one of"),
        ({"key": ["id"], "order": "input"}, "order must be"),
        ({"key": "id"}, "key must be a list of columns"),
        ({"key": []}, "key must be a list of columns"),
        ({"key": ["nope"]}, "key: the dataset has no column 'nope'; its columns are: id, prompt"),
        ({"key": ["id", 5]}, "key: the dataset has no column 5"),
        ({"key": ["id"], "output_format": ["jsonl"]}, "output_format must be one of"),
        ({"key": ["id"], "max_rows_per_file": 0}, "max_rows_per_file must be a whole number of 1 or more; got 0"),
        ({"key": ["id"], "max_rows_per_file": 1.5}, "max_rows_per_file must be"),
        ({"key": ["id"], "flush_interval_s": float("nan")}, "flush_interval_s must be a number of seconds above 0"),
    ],
)
def test_mistakes_are_said_before_anything_runs(
    cluster: None, make_processor: Make, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    dataset = ray.data.from_items([{"id": 1, "prompt": "x"}])
    with pytest.raises(ConfigError, match=said):
        write_results(make_processor(), dataset, str(tmp_path / "out"), **changes)
    assert not (tmp_path / "out").exists()


def test_what_was_begun_with_other_settings_is_left_alone(
    cluster: None, make_processor: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, out = ray.data.from_items([{"id": 1, "prompt": "x"}]), str(tmp_path / "out")

    def die(*args: Any) -> None:
        raise RuntimeError("died before the files were in their places")

    with monkeypatch.context() as patched:
        patched.setattr("millrace.pipeline.job.writing.publish", die)
        with pytest.raises(RuntimeError, match="died"):
            write_results(make_processor(postprocess=keep), dataset, out, key=["id"])
    other = make_processor(postprocess=keep, sampling_params={"temperature": 0.5})
    with pytest.raises(ConfigError, match=r'sampling was null and is now \{"temperature": 0.5\}'):
        write_results(other, dataset, out, key=["id"])
    other = make_processor(postprocess=keep, engine_kwargs={"hf_overrides": {"rope_theta": 1.0}})
    with pytest.raises(ConfigError, match=r"engine was .* and is now .*rope_theta"):
        write_results(other, dataset, out, key=["id"])
    assert write_results(make_processor(postprocess=keep), dataset, out, key=["id"]).num_rows == 1


def test_files_of_others_are_left_alone(cluster: None, make_processor: Make, tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="already holds"):
        write_results(make_processor(), ray.data.from_items([{"id": 1}]), str(tmp_path), key=["id"])
