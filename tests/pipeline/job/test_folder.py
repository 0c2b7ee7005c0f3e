"""What a job keeps of itself in its output folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from millrace.engine.errors import ConfigError, DamagedOutputError
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.job.config import JobConfig
from millrace.pipeline.job.folder import JobFolder, JobState
from millrace.pipeline.job.run import _state, prepare_job, prepare_resume
from millrace.pipeline.job.writing import _settings_of
from millrace.pipeline.openai_batch.batch_config import BatchConfig
from millrace.pipeline.openai_batch.folder import BatchFolder
from millrace.pipeline.processor.request_config import HttpRequestProcessorConfig

URL = "https://me:pw@host/rows.parquet?token=pw"


def begin(folder: Path, **fields: Any) -> Path:
    """Writes the state of a job into a folder, and returns the file."""
    job = JobConfig(**{"model": "m", "input": URL, "output": str(folder), "prompt": "{x}", **fields})
    file = SimpleNamespace(path=URL, size=1, etag="e")
    source = SimpleNamespace(versions={}, files=[file], schema=pa.schema([]), num_rows=1)
    JobFolder(Storage.at(folder)).write_state(_state(job, source))  # type: ignore[arg-type]
    return folder / "_millrace" / "job.json"


def test_the_state_of_a_job_holds_no_secret_and_is_its_owners(tmp_path: Path) -> None:
    prompt = "Is https://you:me@there right?"
    file = begin(tmp_path, engine={"hf_token": "pw", "max_num_seqs": 3}, prompt=prompt)
    text = file.read_text()
    assert "pw" not in text and "host/rows.parquet" in text and json.loads(text)["job"]["prompt"] == prompt
    assert json.loads(text)["job"]["engine"]["max_num_seqs"] == 3
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_job_whose_address_is_not_kept_is_resumed_with_its_file(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(ConfigError, match="millrace run"):
        prepare_resume(str(tmp_path))


def test_the_settings_of_a_processor_are_kept_without_secrets() -> None:
    kept = _settings_of(HttpRequestProcessorConfig(url="https://me:pw@host/ask?api-key=pw"))
    assert "pw" not in str(kept) and "host/ask" in str(kept)


def test_the_state_of_a_batch_holds_no_secret(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{}")
    config = BatchConfig(
        model="m", input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"), engine={"hf_token": "pw"}
    )
    folder = BatchFolder(config)
    folder.begin()
    assert "pw" not in "".join(path.read_text() for path in Path(folder.root.url).iterdir())


def test_a_draft_of_another_run_that_just_begins_is_no_work_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "_millrace" / "writers").mkdir(parents=True)
    for name in (".job.json.0123456789ab.tmp", "writers/000001.json"):
        (tmp_path / "_millrace" / name).write_text("{")
    state = JobState({}, [], None, "", "1")
    assert not JobFolder(Storage.at(tmp_path)).check(state, overwrite=False)
    (tmp_path / "_millrace" / "work").write_text("")
    with pytest.raises(ConfigError, match="already holds '_millrace'"):
        JobFolder(Storage.at(tmp_path)).check(state, overwrite=False)


@pytest.mark.parametrize("link", ["_millrace", "_millrace/writers", "_millrace/work", "_failed"])
def test_a_folder_of_a_job_that_is_a_link_is_refused_before_anything_in_it_is_read(
    tmp_path: Path, model_folder: Path, link: str
) -> None:
    victim = tmp_path / "victim"
    (victim / "results").mkdir(parents=True)
    for name in ("000001.json", "000001.beat", "writers"):
        (victim / name).touch()
    (tmp_path / "in.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "out" / link).parent.mkdir(parents=True)
    (tmp_path / "out" / link).symlink_to(victim)
    job = JobConfig(model=str(model_folder), input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"), prompt="")
    with pytest.raises(DamagedOutputError, match="not inside that folder"):
        prepare_job(job, overwrite=True)
    assert len(list(victim.iterdir())) == 4


@pytest.mark.parametrize("name", [".out.jsonl.millrace", ".out.jsonl.millrace.writers"])
def test_the_folders_of_a_batch_are_no_links(tmp_path: Path, name: str) -> None:
    (tmp_path / "in.jsonl").write_text("{}")
    (tmp_path / "victim").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "victim")
    config = BatchConfig(model="m", input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"))
    with pytest.raises(DamagedOutputError, match="is a link"):
        BatchFolder(config).check(overwrite=True)
