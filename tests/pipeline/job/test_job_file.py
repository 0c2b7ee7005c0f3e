"""Job files, the environment and the command line: which counts, and where a mistake is told to be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millrace import ConfigError
from millrace.engine.env import JOB_PREFIX
from millrace.pipeline import JobConfig, load_job
from millrace.pipeline.job.file import find_field, read_setting

GOOD = """\
model: model
input: in.parquet
output: out
batch_size: 16
sampling:
  temperature: 0
  max_tokens: 8
engine:
  max_num_seqs: 32
messages:
  - role: system
    content: be brief
  - role: user
    content: "{line}"
"""


@pytest.fixture
def job_file(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good job file in an environment that says nothing of jobs."""
    import os

    for name in [name for name in os.environ if name.startswith(JOB_PREFIX)]:
        monkeypatch.delenv(name)
    file = tmp_path / "job.yaml"
    file.write_text(GOOD)
    return file


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(
    job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_job(job_file).batch_size == 16
    monkeypatch.setenv("MILLRACE_JOB_BATCH_SIZE", "32")
    assert load_job(job_file).batch_size == 32
    assert load_job(job_file, batch_size=64).batch_size == 64
    assert load_job(job_file, settings=["batch_size=128"]).batch_size == 128


def test_fields_inside_fields_are_set_one_by_one(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_JOB_ENGINE__MAX_NUM_SEQS", "64")
    monkeypatch.setenv("MILLRACE_JOB_SAMPLING__TOP_P", "0.5")
    job = load_job(job_file, settings=["sampling.max_tokens=9", "prices.per_accelerator_hour.H100=2.5"])
    assert job.engine == {"max_num_seqs": 64}
    assert job.sampling == {"temperature": 0, "max_tokens": 9, "top_p": 0.5}
    assert job.prices is not None
    assert job.prices.per_accelerator_hour == {"H100": 2.5}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("output_column=007", "007"),
        ("output_column=true", "true"),
        ("columns=[a, b]", ["a", "b"]),
        ("limit=7", 7),
        ("limit=null", None),
        ("on_error=stop", "stop"),
        ("seed= 3", 3),
    ],
)
def test_a_value_is_read_as_its_field_wants_it(job_file: Path, setting: str, value: Any) -> None:
    assert getattr(load_job(job_file, settings=[setting]), setting.partition("=")[0]) == value


def test_a_prompt_is_text_whatever_it_looks_like(job_file: Path) -> None:
    prompts = ["The mood: {text}", "[1, 2]", "null", "- a\n- b", "a=b", "{open"]
    for prompt in prompts[:-1]:
        job = load_job(job_file, settings=["messages=null", f"prompt={prompt}"])
        assert job.prompt == prompt
    with pytest.raises(ConfigError, match="--set prompt"):
        load_job(job_file, settings=["messages=null", f"prompt={prompts[-1]}"])


def test_paths_in_the_file_start_at_its_folder_and_others_at_the_current_one(
    job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_JOB_OUTPUT", "elsewhere")
    job = load_job(job_file, settings=["input=[a.jsonl, b.jsonl]"])
    assert job.model == str(job_file.parent / "model")
    assert (job.input, job.output) == (["a.jsonl", "b.jsonl"], "elsewhere")


def test_a_job_needs_no_file(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_JOB_MODEL", str(model_folder))
    job = load_job(None, settings=["output=out"], input="in.parquet", prompt="{line}")
    assert (job.model, job.output, job.prompt) == (str(model_folder), "out", "{line}")
    with pytest.raises(ConfigError, match="pass a job file, or --output"):
        load_job(None, input="in.parquet")


def test_prices_may_be_in_another_file(job_file: Path) -> None:
    (job_file.parent / "prices.yaml").write_text("currency: EUR\nper_replica_hour: 2\n")
    job_file.write_text(GOOD + "prices: prices.yaml\n")
    prices = load_job(job_file).prices
    assert prices is not None
    assert (prices.currency, prices.per_replica_hour) == ("EUR", 2)
    (job_file.parent / "prices.yaml").write_text("- 3\n")
    with pytest.raises(ConfigError, match="must hold a table"):
        load_job(job_file)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("batch_size: 16", "batch_size: 0", "job.yaml:4: JobConfig.batch_size: input should be greater than 0"),
        ("  max_tokens: 8", "  max_tokens: -1", "job.yaml:7: sampling: max_tokens must be"),
        ("  max_tokens: 8", "  max_token: 8", "job.yaml:7: sampling: "),
        (
            "  max_num_seqs: 32",
            "  max_num_seqs: 0",
            "job.yaml:9: engine: max_num_seqs must be an integer",
        ),
        ("  max_num_seqs: 32", "  max_num_seq: 32", "job.yaml:9: engine: the engine has no field 'max_num_seq'"),
        ("  max_num_seqs: 32", "  tokenizer: 3", "job.yaml:9: engine: tokenizer must be a path or a text"),
        ("  max_num_seqs: 32", "  model: x", "job.yaml:9: engine: leave out model"),
        ("    content: be brief", "    contents: be brief", "MessageTemplate has no field 'contents'"),
        ("    content: be brief", "    content: 3", "job.yaml:12: JobConfig.messages.0: MessageTemplate.content"),
        ('    content: "{line}"', '    content: "{line!r}"', "messages: "),
        ("    content: be brief\n", "", "job.yaml:11: JobConfig.messages.0: MessageTemplate.content is missing"),
        (
            "batch_size: 16",
            "batch_size: 16\nprices: {per_hour: 1}",
            "job.yaml:5: JobConfig.prices: Prices has no field 'per_hour'",
        ),
        ("batch_size: 16", "batch_size: [1", "not valid YAML"),
        ("batch_size: 16", "1: 2", "job.yaml:4: the name of a field is text; got 1"),
    ],
)
def test_a_mistake_is_shown_with_its_line(job_file: Path, before: str, after: str, said: str) -> None:
    assert before in GOOD
    job_file.write_text(GOOD.replace(before, after))
    with pytest.raises(ConfigError) as caught:
        load_job(job_file)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("null: 1", "the name of a field is text; got null; write it in quotes"),
        ("yes: 1", "the name of a field is text; got yes"),
        ("0x10: 1", "the name of a field is text; got 0x10"),
        ("2024-01-01: 1", "the name of a field is text; got 2024-01-01"),
        ("2024-13-45: 1", "the name of a field is text; got 2024-13-45"),
        ("1.5: 1", "the name of a field is text; got 1.5"),
        ("? [a]\n: 1", "not valid YAML: found unhashable key"),
        ("prices: {null: 1}", "the name of a field in prices is text; got null"),
        ("prices: {per_accelerator_hour: {yes: 1}}", "the name of a field in per_accelerator_hour is text; got yes"),
        ("columns: [a, {on: 1}]", "the name of a field in columns is text; got on"),
        ("limit: 2024-01-01", "limit holds a date 2024-01-01; write it in quotes if it is text"),
        ("limit: 2024-13-45", "limit holds a date 2024-13-45"),
        ("key: [2024-01-01 10:00:00]", "key holds a date 2024-01-01 10:00:00"),
        ("limit: !!binary aGk=", "limit holds bytes"),
        ("limit: !!set {a}", "limit holds a set"),
        ("limit: 1\nlimit: 2", "the field 'limit' is there twice"),
        ("limit: &a [*a]", "an alias stands for a part that holds it"),
        ("limit: " + "[" * 3000, "nested too deeply"),
        ("limit: " + "9" * 5000, "a value cannot be read"),
        ("limit: !!python/object/apply:os.system [ls]", "not valid YAML: could not determine a constructor"),
        ("limit: yes", "JobConfig.limit: input should be a number; got True"),
        ("seed: no", "JobConfig.seed: input should be a number; got False"),
        ("seed: 99999999999999999999", "JobConfig.seed: input should be less than"),
        ("flush_interval_s: .inf", "JobConfig.flush_interval_s: input should be a finite number"),
        ("output_column: ''", "JobConfig.output_column: string should have at least 1 character"),
        ("self: 3", "JobConfig has no field 'self'"),
        ("prices: '~nobody/prices.yaml'", "job.yaml:15: the table '~nobody/prices.yaml' of prices cannot be read"),
        ('prices: "a\\0b"', "cannot be read: embedded null byte"),
        ("columns: [" + "3, " * 5000 + "]", "JobConfig: there are 4995 more problems"),
        ("prices: {per_accelerator_hour: {" + "x" * 1000 + ": no}}", "input should be"),
        ("endpoint_url: 3", "JobConfig.endpoint_url: input should be a valid string; got 3"),
    ],
)
def test_what_yaml_reads_as_other_than_text_and_numbers_is_refused_with_its_field(
    job_file: Path, more: str, said: str
) -> None:
    job_file.write_text(GOOD + more + "\n")
    with pytest.raises(ConfigError) as caught:
        load_job(job_file)
    assert said in str(caught.value)
    assert "job.yaml" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_ids_of_tokens_may_be_the_names_of_fields(job_file: Path) -> None:
    job_file.write_text(GOOD.replace("  max_tokens: 8", "  logit_bias: {5: 1.0}"))
    assert load_job(job_file).sampling == {"temperature": 0, "logit_bias": {5: 1.0}}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LIMIT", "2024-13-45", "MILLRACE_JOB_LIMIT: the text holds a date 2024-13-45"),
        ("BATCH_SIZE", "0", "MILLRACE_JOB_BATCH_SIZE: JobConfig.batch_size: input should be greater than 0"),
        ("BATCH_SIZES", "1", "MILLRACE_JOB_BATCH_SIZES: JobConfig has no field 'batch_sizes'; did you mean"),
        ("ENGINE__SEED", "x", "MILLRACE_JOB_ENGINE__SEED: engine: seed must be an integer"),
        ("COLUMNS", "[a", "MILLRACE_JOB_COLUMNS: not valid YAML"),
    ],
)
def test_a_mistake_in_the_environment_is_shown_with_its_variable(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(JOB_PREFIX + name, value)
    with pytest.raises(ConfigError) as caught:
        load_job(job_file)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("engine", "is not of the form field=value"),
        ("a b=1", "is not of the form field=value"),
        ("batch_size=x", "--set batch_size: JobConfig.batch_size: input should be a valid integer"),
        ("model.x=1", "model"),
    ],
)
def test_a_mistake_in_a_setting_is_shown_with_the_setting(job_file: Path, setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(job_file, settings=[setting])
    assert said in str(caught.value)


def test_a_setting_keeps_what_follows_the_first_equals_sign() -> None:
    assert read_setting("prompt=a=b") == ("prompt", "a=b")


def test_a_message_is_about_the_innermost_written_field() -> None:
    paths = ["model", "engine", "engine.model", "sampling", "sampling.temperature", "messages.0.content", "content"]
    assert find_field("sampling: temperature must be a number", paths) == "sampling.temperature"
    assert find_field("JobConfig.messages.0.content: no", paths) == "messages.0.content"
    assert find_field("JobConfig.messages.1.content: no", ["messages", *paths]) == "messages"
    assert find_field("the engine has no field 'model'", paths) == "engine.model"
    assert find_field("nothing of that kind", paths) is None


def test_the_published_schema_is_up_to_date(root: Path) -> None:
    from millrace.pipeline.job.schema import schema_text

    published = (root / "docs" / "job.schema.json").read_text(encoding="utf-8")
    assert published == schema_text(), "run: millrace schema > docs/job.schema.json"


def test_every_field_of_the_schema_is_described() -> None:
    from millrace.pipeline.job.schema import job_schema

    schema = job_schema()
    parts = [schema, *schema["$defs"].values(), schema["properties"]["engine"]]
    parts.append(schema["properties"]["sampling"]["anyOf"][0])
    for part in parts:
        assert [name for name, field in part["properties"].items() if not field.get("description")] == []
    assert set(schema["properties"]) == set(JobConfig.model_fields)
    assert schema["required"] == ["model", "input", "output"]


def test_job_files_of_this_repository_point_editors_at_the_schema(root: Path) -> None:
    files = [file for file in (root / "examples").rglob("*.yaml") if "model:" in file.read_text()]
    assert files
    for file in files:
        first = file.read_text().splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        assert (file.parent / first.partition("=")[2]).resolve() == root / "docs" / "job.schema.json"


def millrace(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "millrace.pipeline.cli", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_init_writes_a_valid_job_file_with_every_field(tmp_path: Path) -> None:
    assert millrace(tmp_path, "init", "new/moods.yaml").returncode == 0
    file = tmp_path / "new" / "moods.yaml"
    job = load_job(file)
    assert job.model == "bundled:invoices"
    text = file.read_text()
    assert [name for name in JobConfig.model_fields if f"{name}:" not in text] == []
    assert max(map(len, text.splitlines())) <= 100
    assert json.loads((file.parent / "job.schema.json").read_text())["required"] == ["model", "input", "output"]
    again = millrace(tmp_path, "init", "new/moods.yaml")
    assert (again.returncode, again.stderr) == (
        2,
        "error: 'new/moods.yaml' is there already; give another path, or remove it\n",
    )
