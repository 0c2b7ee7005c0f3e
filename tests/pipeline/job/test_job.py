"""Job files, the output folder, and the summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace import ConfigError, MillraceError
from millrace.pipeline import JobConfig, columns, load_job
from millrace.pipeline.job.durable import PrepareNew
from millrace.pipeline.job.rows import REPORTED, MakePrompt, MakeResult
from millrace.pipeline.job.run import _begin, prepare_job, prepare_resume, prepare_retry
from millrace.pipeline.job.settings import processor_config
from millrace.pipeline.job.template import Template
from millrace.pipeline.processor.operators import unpack
from millrace.pipeline.report import JobSummary
from millrace.pipeline.sources.formats import FORMATS
from millrace.pipeline.stages.user_function import PreprocessStage

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


def test_a_model_may_be_a_file_beside_the_job_file(folder: Path) -> None:
    (folder / "m.gguf").touch()
    assert load(folder, GOOD.replace("model: model", "model: m.gguf")).model == str(folder / "m.gguf")


def test_flags_win_and_start_at_the_current_folder(folder: Path) -> None:
    job = load(folder, GOOD, output="elsewhere", replicas=2, limit=None)
    assert (job.output, job.replicas, job.limit) == ("elsewhere", 2, None)


def test_the_name_of_a_bundled_model_is_not_a_path(folder: Path) -> None:
    assert load(folder, GOOD.replace("model: model", "model: bundled:invoices")).model == "bundled:invoices"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "promt: x\n", "job.yaml:5: JobConfig has no field 'promt'; did you mean 'prompt'?"),
        (GOOD + "replicas: 0\n", "job.yaml:5: JobConfig.replicas: input should be greater than 0"),
        (GOOD + "sampling:\n  max_tokns: 3\n", "job.yaml:6: sampling: SamplingParams has no field 'max_tokns'"),
        (
            GOOD + "sampling:\n  structured_outputs:\n    regex: (a\n",
            "regex cannot be compiled: unclosed group; got '(a'",
        ),
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
def test_a_mistake_in_a_job_file_is_shown_with_its_line(folder: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_job_file_raises_an_error() -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_job("nowhere.yaml")


def test_the_output_keeps_the_input_and_adds_the_result(folder: Path) -> None:
    assert prepare_job(load(folder, GOOD)).spec.schema.names == [
        "id", "line", "generated_text", "finish_reason", "num_input_tokens", "num_cached_tokens",
        "num_generated_tokens",
    ]  # fmt: skip


def test_columns_and_sequences_can_be_chosen(folder: Path) -> None:
    more = "columns: [id]\noutput_column: answer\nsampling: {n: 2, temperature: 1.0}\n"
    assert prepare_job(load(folder, GOOD + more)).spec.schema.names[:3] == ["id", "answer", "outputs"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("columns: [idd]\n", "no column 'idd'; did you mean 'id'?"),
        ("key: [idd]\n", "no column 'idd'; did you mean 'id'?"),
        ("output_column: line\n", "'line' would be overwritten"),
        ("output_column: finish_reason\n", "output_column 'finish_reason' is the name of another column"),
        ("engine: {max_num_sqs: 3}\n", "did you mean 'max_num_seqs'?"),
    ],
)
def test_a_job_is_checked_against_its_input_before_ray_starts(folder: Path, more: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_job(load(folder, GOOD + more))
    assert said in str(caught.value)


def test_the_input_needs_a_prompt_column_if_the_job_has_no_prompt(folder: Path) -> None:
    with pytest.raises(ConfigError, match="neither prompt nor messages"):
        prepare_job(load(folder, GOOD.replace("prompt: 'Q: {line}'\n", "")))


def test_a_folder_without_a_model_raises_an_error(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        prepare_job(load(folder, GOOD))


def begin(job: JobConfig) -> None:
    """Leaves in the output folder what a job leaves that has begun."""
    prepared = prepare_job(job)
    prepared.folder.write_state(prepared.state)


def finish(folder: Path, num_failed: int) -> None:
    manifest = {"num_rows": 3, "num_failed": num_failed, "files": [], "counts": {}, "failed_counts": {}}
    failed = [{"name": "_failed/part-00000.parquet", "num_rows": num_failed, "num_bytes": 1}] if num_failed else []
    (folder / "out" / "_manifest.json").write_text(json.dumps({**manifest, "failed_files": failed}))


def test_preparing_writes_nothing(folder: Path) -> None:
    prepare_job(load(folder, GOOD))
    assert not (folder / "out").exists()


def test_two_jobs_are_never_mixed(folder: Path) -> None:
    (folder / "out").mkdir()
    assert not prepare_job(load(folder, GOOD)).resumes
    (folder / "out" / "_failed").mkdir()
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare_job(load(folder, GOOD))
    prepared = prepare_job(load(folder, GOOD), overwrite=True)
    prepared.folder.clear(prepared.state.publisher)
    assert list((folder / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["thesis.doc", "folder.parquet/x"])
def test_overwriting_removes_only_files_of_jobs(folder: Path, name: str) -> None:
    file = folder / "out" / name
    file.parent.mkdir(parents=True)
    file.touch()
    (folder / "out" / "a.parquet").touch()
    with pytest.raises(ConfigError, match="pass another folder"):
        prepare_job(load(folder, GOOD), overwrite=True)
    assert file.exists()
    assert (folder / "out" / "a.parquet").exists()


@pytest.mark.parametrize("name", ["mine.csv", "part-0.jsonl", "part-00000.txt", "_failed/mine.parquet", "part-00001"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_a_job_with_a_file_of_another_name_is_left_alone(folder: Path, name: str, overwrite: bool) -> None:
    begin(load(folder, GOOD))
    file = folder / "out" / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    with pytest.raises(ConfigError, match=f"already holds '{name}'; pass another folder"):
        prepare_job(load(folder, GOOD), overwrite=overwrite)
    file.unlink()
    (folder / "out" / "part-00000.parquet").touch()
    (folder / "out" / ".kept").touch()
    _begin(prepare_job(load(folder, GOOD), overwrite=True))
    assert sorted(path.name for path in (folder / "out").iterdir()) == [".kept", "_millrace"]


def test_parts_without_a_job_are_anothers(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "part-00000.parquet").touch()
    with pytest.raises(ConfigError, match=r"already holds 'part-00000\.parquet'"):
        prepare_job(load(folder, GOOD), overwrite=True)


@pytest.mark.parametrize(("given", "output"), [("out", "out"), ("out/part-00000.parquet", "link"), ("link", "out")])
def test_an_output_that_holds_the_input_is_refused(folder: Path, given: str, output: str) -> None:
    begin(load(folder, GOOD))
    (folder / "in.parquet").rename(folder / "out" / "part-00000.parquet")
    (folder / "link").symlink_to(folder / "out")
    job = load(folder, GOOD.replace("in.parquet", given).replace("output: out", f"output: {output}"))
    with pytest.raises(ConfigError, match=r"holds 'part-00000\.parquet', which is a file of the input"):
        prepare_job(job, overwrite=True)


@pytest.mark.parametrize("more", ["", "replicas: 2\nengine: {max_num_seqs: 7}\nflush_interval_s: 1\non_error: stop\n"])
def test_an_unfinished_job_goes_on(folder: Path, more: str) -> None:
    begin(load(folder, GOOD))
    (folder / "out" / "._manifest.json.1.tmp").write_bytes(b"{")  # As a death leaves it.
    assert prepare_job(load(folder, GOOD + more)).resumes
    assert prepare_resume(str(folder / "out")).resumes


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("", "seed: 3\n", "seed was null and is now 3"),
        ("", "sampling: {max_tokens: 3}\n", 'sampling was null and is now {"max_tokens": 3}'),
        ("engine: {dtype: float32}\n", "", 'engine was {"dtype": "float32"} and is now {}'),
        ("", "key: [id]\n", 'key was null and is now ["id"]'),
        ("lora_modules: {a: org/a}\n", "lora_modules: {a: org/b}\n", 'lora_modules was {"a": "org/a"} and is now'),
        ("", "dynamic_lora_loading_path: s3://b/a\n", 'dynamic_lora_loading_path was null and is now "s3://b/a"'),
    ],
)
def test_a_changed_job_is_refused_and_the_change_named(folder: Path, before: str, after: str, said: str) -> None:
    begin(load(folder, GOOD + before))
    with pytest.raises(ConfigError) as caught:
        prepare_job(load(folder, GOOD + after))
    assert said in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert not prepare_job(load(folder, GOOD + after), overwrite=True).resumes


def test_a_changed_input_is_refused(folder: Path) -> None:
    begin(load(folder, GOOD))
    pq.write_table(pa.table({"id": [1, 2], "line": ["a", "b"]}), folder / "in.parquet")
    with pytest.raises(ConfigError, match="input was"):
        prepare_resume(str(folder / "out"))


def test_a_finished_job_is_left_alone(folder: Path) -> None:
    begin(load(folder, GOOD))
    finish(folder, num_failed=0)
    with pytest.raises(ConfigError, match="a finished job; pass --overwrite"):
        prepare_job(load(folder, GOOD))
    with pytest.raises(ConfigError, match="nothing to resume"):
        prepare_resume(str(folder / "out"))
    with pytest.raises(ConfigError, match="no failed rows"):
        prepare_retry(str(folder / "out"))


def test_failed_rows_of_a_finished_job_can_run_again(folder: Path) -> None:
    begin(load(folder, GOOD))
    with pytest.raises(ConfigError, match="not finished; first: millrace resume"):
        prepare_retry(str(folder / "out"))
    finish(folder, num_failed=1)
    (folder / "in.parquet").unlink()
    prepared = prepare_retry(str(folder / "out"), batch_size=3)
    assert prepared.job.batch_size == 3
    assert prepared.spec.schema.names[:3] == ["id", "line", "generated_text"]


def test_only_an_output_folder_can_be_resumed(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is no output folder of a job"):
        prepare_resume(str(folder))


def test_the_columns_a_stage_reads_are_the_jobs_not_the_inputs() -> None:
    ask = MakePrompt((Template.parse("{prompt}!"),), (), {"max_tokens": 3})
    names = {value for value in vars(columns).values() if isinstance(value, str)} - columns.RESERVED
    row = {**dict.fromkeys(names, "theirs"), "finish_reason": None}
    asked = {**row, **ask(row)}
    assert {name: value for name, value in asked.items() if value is not None} == {
        "prompt": "theirs!",
        "sampling_params": {"max_tokens": 3},
        columns.INPUT: row,
    }
    done = {"generated_text": "t", "outputs": None, "finish_reason": "stop", "num_input_tokens": 1}
    result = MakeResult("answer")({**asked, **done, "num_cached_tokens": 0, "num_generated_tokens": 1})
    assert {name for name in names if result[name] != row[name]} == {*REPORTED}
    assert result["answer"] == "t"


def test_a_row_brings_settings_only_where_the_job_lists_their_columns(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "p", "messages": [{"role": "user", "content": "x"}], "tools": "[]", "chat_template": "{{ 1 }}"}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    bare = GOOD.replace("prompt: 'Q: {line}'\n", "")
    job = load(folder, bare + "row_settings: [tools]\n")
    assert prepare_job(job).spec.schema.names[:4] == list(rows[0])
    assert "columns chat_template of the input are kept but not used" in caplog.text
    asked = MakePrompt.of(job)(rows[0])
    assert (asked["messages"], asked["tools"], asked["chat_template"]) == (rows[0]["messages"], "[]", None)
    with pytest.raises(ConfigError, match="no column 'chat_template_kwargs'"):
        prepare_job(load(folder, bare + "row_settings: [chat_template_kwargs]\n"))
    with pytest.raises(ConfigError, match=r"row_settings\.0: input should be 'tools', 'chat_template' or"):
        load(folder, bare + "row_settings: [model]\n")


@pytest.mark.parametrize(
    "more",
    ["lora_modules: {a: adapters/a}\n", "dynamic_lora_loading_path: adapters\n", "engine: {enable_lora: true}\n"],
)
def test_the_column_model_names_adapters_only_in_a_job_that_has_some(
    folder: Path, caplog: pytest.LogCaptureFixture, more: str
) -> None:
    row = {"line": "x", "model": "a"}
    assert MakePrompt.of(load(folder, GOOD))(row)["model"] is None
    (folder / "adapters" / "a").mkdir(parents=True)
    job = load(folder, GOOD + more)
    assert MakePrompt.of(job)(row)["model"] == "a"
    assert MakePrompt.of(job)({"line": "x"})["model"] is None
    prepared = prepare_job(job)
    assert "the input has no column 'model' that names an adapter" in caplog.text
    place = {"lora": str(folder / "adapters" / "a"), "dyna": str(folder / "adapters" / "a"), "engi": "a"}[more[:4]]
    found = prepared.config.adapter_names.find("a")
    assert found is not None
    assert found.lora_path == place
    pq.write_table(pa.Table.from_pylist([row]), folder / "in.parquet")
    source = prepare_job(load(folder, GOOD + more + "columns: []\n")).source
    assert source is not None
    assert source.schema.names == ["line", "model"]


@pytest.mark.parametrize("name", sorted(columns.RESERVED))
def test_a_column_of_a_name_that_the_pipeline_needs_is_refused(folder: Path, name: str) -> None:
    pq.write_table(pa.table({"line": ["a"], name: [1]}), folder / "in.parquet")
    with pytest.raises(ConfigError, match=f"names the pipeline needs for itself: {name};"):
        prepare_job(load(folder, GOOD))


def test_the_output_keeps_a_column_of_the_input_that_is_called_outputs(folder: Path) -> None:
    done = dict.fromkeys(REPORTED, 1) | {"generated_text": "t", "outputs": None, columns.INPUT: {"outputs": 3}}
    assert MakeResult("generated_text")(done)["outputs"] == 3


def test_messages_are_filled_in() -> None:
    ask = MakePrompt((Template.parse("Be {how}."), Template.parse("{line}")), ("system", "user"), None)
    asked = ask({"how": "brief", "line": "x"})
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert asked.get("prompt") is None


def test_a_summary_says_whether_every_row_came_out() -> None:
    summary = JobSummary("m", "out", 4, 3, 0, 100, 10, 50, 1.0, 2.0, 0.1, {"stop": 3}, {})
    assert summary.as_dict()["output_tokens_per_s"] == 25.0
    assert not summary.is_complete


@pytest.mark.parametrize(
    ("given", "num_rows", "expected"),
    [(None, 99_999, 128), (None, 100_000, 1024), (None, None, 1024), (16, None, 16), (16, 10, 16)],
)
def test_blocks_of_a_large_input_are_larger_unless_the_job_says(
    given: int | None, num_rows: int | None, expected: int
) -> None:
    job = JobConfig(model="bundled:invoices", input="x.jsonl", output="out", batch_size=given)
    assert processor_config(job, num_rows).batch_size == expected


def test_a_folder_of_another_version_raises_an_error_of_one_line(folder: Path) -> None:
    state = folder / "out" / "_millrace" / "job.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"job": {}, "unheard_of": 1}')
    with pytest.raises(ConfigError, match=r"job.json' does not describe a job of this version .*; remove the folder"):
        prepare_resume(str(folder / "out"))


def test_the_prompt_of_a_row_shows_its_own_object(folder: Path) -> None:
    metas = [{"a": 1}, {f"key {at}": None for at in range(20)}, {}]
    (folder / "in.jsonl").write_text("".join(json.dumps({"meta": meta}) + "\n" for meta in metas))
    prepared = prepare_job(load(folder, GOOD.replace("in.parquet", "in.jsonl").replace("{line}", "{meta}")))
    assert prepared.source is not None
    (unit,) = prepared.source.units
    (table,) = FORMATS["jsonl"].read(unit, prepared.source.schema)
    stages = [PreprocessStage(MakePrompt.of(prepared.job))]
    prepare = PrepareNew(lambda: stages, prepared.identity, prepared.folder.work, (), schema=prepared.spec.input_schema)
    assert [row.data["prompt"] for row in unpack(prepare(table))] == [f"Q: {json.dumps(meta)}" for meta in metas]


def test_a_job_reads_the_columns_that_it_names_or_keeps(folder: Path) -> None:
    prepared = prepare_job(load(folder, GOOD + "columns: []\n"))
    assert prepared.source is not None
    assert prepared.source.schema.names == ["line"]
    assert prepared.source.num_rows == 3


WHOLE = {"job": {"engine": {}, "output_format": "parquet"}, "inputs": [], "num_rows": 1, "input_schema": ""}
DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "odd",
    [
        *({"job": one} for one in (5, [], {}, {"engine": None}, {"engine": [1]}, {"output_format": []})),
        {"job": {"output_format": "parquet", "input": "x"}},
        *({"inputs": one} for one in (5, [5], [{"table": "x"}])),
        {"num_rows": "x"},
        {"input_schema": 5},
        {"more": 1},
        *(5, [], None, DEEP, "pipe", "folder"),
    ],
)
def test_a_description_of_a_job_with_odd_values_is_refused(folder: Path, odd: Any) -> None:
    file = folder / "out" / "_millrace" / "job.json"
    file.parent.mkdir(parents=True)
    if odd in ("pipe", "folder"):
        os.mkfifo(file) if odd == "pipe" else file.mkdir()
    else:
        content = WHOLE | {"version": "1"} | odd if isinstance(odd, dict) else odd
        file.write_text(DEEP if odd == DEEP else json.dumps(content))
    (folder / "out" / "_manifest.json").write_text("{}")
    for prepare in (
        lambda: prepare_job(load(folder, GOOD), overwrite=True),
        lambda: prepare_resume(str(folder / "out")),
        lambda: prepare_retry(str(folder / "out")),
    ):
        with pytest.raises(ConfigError, match="does not describe a job") as caught:
            prepare()
        assert len(str(caught.value)) < 800


@pytest.mark.parametrize("schema", ["", "x", "AAAA", "////"])
def test_columns_of_a_finished_job_that_cannot_be_read_are_said(folder: Path, schema: str) -> None:
    begin(load(folder, GOOD))
    finish(folder, 1)
    file = folder / "out" / "_millrace" / "job.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"input_schema": schema}))
    with pytest.raises(MillraceError, match="cannot be read"):
        prepare_retry(str(folder / "out"))


def test_an_input_whose_name_is_no_utf8_is_read_and_known_again(folder: Path) -> None:
    os.mkdir(os.fsencode(folder) + b"/data")
    (folder / "in.parquet").rename(os.fsdecode(os.fsencode(folder) + b"/data/\xff.parquet"))
    job = load(folder, GOOD.replace("in.parquet", "data"))
    begin(job)
    assert prepare_job(job).resumes
    (folder / "data").rename(folder / "hive")
    (folder / "data").mkdir()
    (folder / "hive").rename(os.fsdecode(os.fsencode(folder) + b"/data/day=\xff"))
    with pytest.raises(ConfigError, match="no UTF-8; rename the folder"):
        prepare_job(job)


@pytest.mark.parametrize(
    "odd",
    [
        {"prompt": "\ud800 {line}"},
        {"messages": [{"role": "user", "content": "\ud800"}], "prompt": None},
        {"output_column": "\ud800"},
        {"columns": ["\ud800"]},
        {"key": ["\ud800"]},
        *({name: 16**4000} for name in ("replicas", "limit", "batch_size", "max_rows_per_file")),
    ],
)
def test_a_value_of_a_job_that_no_row_could_run_with_is_refused(odd: dict[str, Any]) -> None:
    (name, *_) = odd
    with pytest.raises(ConfigError, match=name):
        JobConfig(**{"model": "m", "input": "i", "output": "o", "prompt": "{line}", **odd})
