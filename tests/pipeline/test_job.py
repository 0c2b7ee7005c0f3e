"""Job files, the output folder, and the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace import ConfigError
from millrace.pipeline import JobConfig, load_job
from millrace.pipeline.job import MakePrompt, MakeResult, prepare_job, prepare_output
from millrace.pipeline.report import COUNTED, JobSummary, OutputScan
from millrace.pipeline.template import Template

GOOD = "model: model\ninput: in.parquet\noutput: out\nprompt: 'Q: {line}'\n"


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Path:
    """A folder with a job's input and model."""
    pq.write_table(pa.table({"id": [1, 2, 3], "line": ["a", "b", None]}), tmp_path / "in.parquet")
    (tmp_path / "job.yaml").write_text(GOOD)
    return tmp_path


def load(folder: Path, text: str, **flags: Any) -> JobConfig:
    (folder / "job.yaml").write_text(text)
    return load_job(folder / "job.yaml", **flags)


def test_relative_paths_start_at_the_job_file(folder: Path) -> None:
    job = load(folder, GOOD)
    assert (job.model, job.input, job.output) == (
        str(folder / "model"),
        [str(folder / "in.parquet")],
        str(folder / "out"),
    )


def test_flags_win_and_start_at_the_current_folder(folder: Path) -> None:
    job = load(folder, GOOD, output="elsewhere", replicas=2, limit=None)
    assert (job.output, job.replicas, job.limit) == ("elsewhere", 2, None)


def test_a_bundled_model_is_no_path(folder: Path) -> None:
    assert load(folder, GOOD.replace("model: model", "model: bundled:invoices")).model == "bundled:invoices"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "promt: x\n", "job.yaml:5: JobConfig has no field 'promt'; did you mean 'prompt'?"),
        (GOOD + "replicas: 0\n", "job.yaml:5: JobConfig.replicas: input should be greater than 0"),
        (GOOD + "sampling:\n  max_tokns: 3\n", "job.yaml:6: sampling: SamplingParams has no field 'max_tokns'"),
        (GOOD + "on_error: skip\n", "job.yaml:5: JobConfig.on_error: input should be 'row' or 'stop'"),
        (GOOD + "messages: [{role: user, content: x}]\n", "job.yaml:4: prompt and messages are both given"),
        (GOOD + "x: [1\n", "job.yaml:6: not valid YAML"),
        (GOOD + "1: 2\n", "job.yaml"),
        ("- a\n", "a job file holds fields"),
        ("", "a job file holds fields"),
        ("model: m\noutput: o\n", "JobConfig.input is missing"),
        (GOOD.replace("{line}", "{line.x!r}"), "job.yaml:4: "),
    ],
)
def test_a_mistake_is_said_with_its_line(folder: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_job_file_is_said() -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_job("nowhere.yaml")


def test_the_output_keeps_the_input_and_adds_the_result(folder: Path) -> None:
    assert prepare_job(load(folder, GOOD)).schema.names == [
        "id", "line", "generated_text", "finish_reason", "num_input_tokens", "num_cached_tokens",
        "num_generated_tokens", "__inference_error__",
    ]  # fmt: skip


def test_columns_and_sequences_can_be_chosen(folder: Path) -> None:
    more = "columns: [id]\noutput_column: answer\nsampling: {n: 2, temperature: 1.0}\n"
    assert prepare_job(load(folder, GOOD + more)).schema.names[:3] == ["id", "answer", "outputs"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("columns: [idd]\n", "no column 'idd'; did you mean 'id'?"),
        ("output_column: line\n", "'line' would be overwritten"),
        ("engine: {max_num_sqs: 3}\n", "did you mean 'max_num_seqs'?"),
    ],
)
def test_a_job_is_checked_against_its_input_before_ray_starts(folder: Path, more: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_job(load(folder, GOOD + more))
    assert said in str(caught.value)


def test_rows_must_bring_a_prompt_where_the_job_has_none(folder: Path) -> None:
    with pytest.raises(ConfigError, match="neither prompt nor messages"):
        prepare_job(load(folder, GOOD.replace("prompt: 'Q: {line}'\n", "")))


def test_a_folder_without_a_model_is_said(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        prepare_job(load(folder, GOOD))


def test_two_jobs_are_never_mixed(folder: Path) -> None:
    out = folder / "out"
    prepare_output(str(out), overwrite=False)
    (out / "a.parquet").touch()
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare_output(str(out), overwrite=False)
    assert list(prepare_output(str(out), overwrite=True).iterdir()) == []


@pytest.mark.parametrize("name", ["thesis.doc", "folder.parquet/x"])
def test_overwriting_removes_nothing_that_is_not_ours(folder: Path, name: str) -> None:
    file = folder / "out" / name
    file.parent.mkdir(parents=True)
    file.touch()
    (folder / "out" / "a.parquet").touch()
    with pytest.raises(ConfigError, match="pass another folder"):
        prepare_output(str(folder / "out"), overwrite=True)
    assert file.exists()
    assert (folder / "out" / "a.parquet").exists()


def test_the_columns_a_stage_reads_are_the_jobs_not_the_inputs() -> None:
    ask = MakePrompt((Template.parse("{prompt}!"),), (), {"max_tokens": 3})
    row = {"prompt": "p", "messages": "m", "model": "car", "tokenized_prompt": [1], "sampling_params": 0}
    asked = {**row, **ask(row)}
    assert (asked["prompt"], asked["messages"], asked["model"], asked["tokenized_prompt"]) == ("p!", None, None, None)
    assert asked["sampling_params"] == {"max_tokens": 3}
    done = {"generated_text": "t", "outputs": None, "finish_reason": "stop", "num_input_tokens": 1}
    result = MakeResult("answer")({**asked, **done, "num_cached_tokens": 0, "num_generated_tokens": 1})
    assert {name: result[name] for name in row} == row
    assert result["answer"] == "t"


def test_messages_are_filled_in() -> None:
    ask = MakePrompt((Template.parse("Be {how}."), Template.parse("{line}")), ("system", "user"), None)
    asked = ask({"how": "brief", "line": "x"})
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert asked["prompt"] is None


def output_table(*rows: tuple[str, str, int | None, int | None, int | None]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(COUNTED, row, strict=True)) for row in rows])


def test_the_summary_is_counted_from_the_files(tmp_path: Path) -> None:
    scan = OutputScan(tmp_path)
    pq.write_table(output_table(("stop", "", 5, 2, 3), ("length", "", 7, 0, 4)), tmp_path / "0.parquet")
    assert scan.update().num_rows == 2
    (tmp_path / "half.parquet").write_bytes(b"PAR1")
    failed = ("error", "tokenize: PromptTypeError: column: x", None, None, None)
    pq.write_table(output_table(failed, failed, ("stop", "", 1, 1, 1)), tmp_path / "1.parquet")
    counts = scan.update()
    assert (counts.num_rows, counts.num_failed) == (5, 2)
    assert (counts.num_input_tokens, counts.num_cached_tokens, counts.num_output_tokens) == (13, 3, 8)
    assert counts.finish_reasons == {"stop": 2, "length": 1, "error": 2}
    assert counts.errors["tokenize: PromptTypeError"].num_rows == 2


def test_a_summary_says_whether_every_row_came_out() -> None:
    summary = JobSummary("m", "out", 4, 3, 0, 100, 10, 50, 1.0, 2.0, 0.1, {"stop": 3}, {})
    assert summary.as_dict()["output_tokens_per_s"] == 25.0
    assert not summary.is_complete
