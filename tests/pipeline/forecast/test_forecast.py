"""`millrace plan`: from a sample to what a job will take; what nobody knows stays unknown. No engine starts for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from millrace import ConfigError
from millrace.pipeline import JobConfig, cli
from millrace.pipeline.commands.plan import read_duration
from millrace.pipeline.forecast.forecast import Forecast
from millrace.pipeline.forecast.run import forecast_job
from millrace.pipeline.forecast.sample import Sample
from millrace.pipeline.forecast.throughput import Throughput
from millrace.pipeline.forecast.view import facts
from millrace.pipeline.sources import Source

LINE = "Invoice 17, due 2024-03-05, total EUR 12.50"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A hundred rows: ninety good ones, six too long, three without a value, one that is none."""
    lines = [json.dumps({"line": f"{LINE} no {n}"}) for n in range(90)]
    lines += [json.dumps({"line": "word " * 300})] * 6 + [json.dumps({"line": None})] * 3 + ['{"line": ']
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def job(rows: Path, **changes: Any) -> JobConfig:
    fields = {
        "model": "bundled:invoices", "input": str(rows), "output": str(rows.parent / "out"),
        "messages": [{"role": "user", "content": "{line}"}], "sampling": {"temperature": 0, "max_tokens": 20},
    }  # fmt: skip
    return JobConfig(**{**fields, **changes})


def test_rows_that_do_not_fit_or_fail_are_counted(rows: Path) -> None:
    told = forecast_job(job(rows)).as_dict()
    assert (told["num_rows"], told["num_rows_is_exact"], told["sample"]["num_rows"]) == (100, True, 100)
    assert told["too_long"] == {"max_model_len": 512, "num_in_sample": 6, "num_rows": 6}
    assert told["prompt_tokens"]["count"] == 96
    assert sum(error["num_rows"] for error in told["failing"].values()) == 4
    assert told["output_tokens_per_row"] == 20


def test_a_job_that_embeds_has_lengths_and_no_speed(rows: Path) -> None:
    asked = {"task_type": "embed", "prompt": "{line}", "messages": None, "sampling": None}
    told = forecast_job(job(rows, **asked)).as_dict()
    assert (told["num_rows"], told["prompt_tokens"]["count"], told["output_tokens_per_row"]) == (100, 96, 1)
    with pytest.raises(ConfigError, match="--measure generates text, and a job of task_type='embed' generates none"):
        forecast_job(job(rows, **asked), measure=True)
    pairs = {**asked, "task_type": "score", "prompt": None, "score_columns": ["line", "line"]}
    with pytest.raises(ConfigError, match="a job of task_type='score' has pairs of texts"):
        forecast_job(job(rows, **pairs))


def test_the_adapters_of_the_sample_and_their_memory_are_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    models = [None, "a", "b", "a", "gone", "../a", "bundled:invoices", "a"]
    rows = [{"line": LINE, "model": model} for model in models]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    asked = {"engine": {"max_loras": 4, "max_lora_rank": 8, "max_cpu_loras": 6}}
    found = forecast_job(
        job(tmp_path / "in.parquet", dynamic_lora_loading_path=str(tmp_path / "adapters"), **asked), sample_size=8
    )
    told = found.as_dict()["adapters"]
    assert (told["num_in_sample"], told["rows_in_sample"]) == (2, {"a": 3, "b": 1})
    assert found.as_dict()["failing"]["generate: AdapterError"]["num_rows"] == 2
    assert told["device_bytes"] == found.footprint.adapter_bytes > 0
    assert told["host_bytes"] == told["device_bytes"] * 6 // 4
    assert "2 named by 4 of 8 rows looked at; on the device 4 at once, of rank 8" in dict(facts(found))["adapters"]
    assert forecast_job(job(tmp_path / "in.parquet")).as_dict()["adapters"] is None


def test_without_a_throughput_time_and_price_by_time_are_unknown(rows: Path) -> None:
    prices = {"per_replica_hour": 2.0, "per_million_output_tokens": 1000.0}
    told = forecast_job(job(rows, prices=prices)).as_dict()
    assert (told["throughput"], told["seconds"], told["replicas"]["needed"]) == (None, None, None)
    assert told["cost"]["by_replica_time"] is None
    assert told["cost"]["by_tokens"] == pytest.approx(90 * 20 * 1000 / 1e6)
    assert told["is_upper_bound"]
    assert forecast_job(job(rows)).as_dict()["cost"] is None


def test_time_and_price_follow_from_a_throughput(rows: Path) -> None:
    prices = {"per_replica_hour": 3600.0, "per_accelerator_hour": {"H100": 7200.0}}
    asked = job(rows, prices=prices, replicas=2)
    told = forecast_job(asked, throughput=Throughput(100.0, 10.0, 1.0, "as given"), within_s=4.0).as_dict()
    assert told["seconds"] == pytest.approx(1.0 + 90 * 10 / 100 / 2)
    assert told["cost"]["by_replica_time"] == pytest.approx(2 * 5.5)
    assert told["cost"]["by_accelerator_time"] == {"H100": pytest.approx(2 * 2 * 5.5)}
    assert told["replicas"]["needed"] == 3
    assert not told["is_upper_bound"]


def test_the_room_for_replicas_is_the_room_of_the_cluster(cluster: None, rows: Path) -> None:
    replicas = forecast_job(job(rows)).replicas
    assert (replicas.placeable, replicas.where) == (
        1,
        "in the cluster of 1 node(s), 2 CPUs of which one is for reading",
    )


def test_no_number_of_replicas_is_done_before_one_has_started(rows: Path) -> None:
    told = forecast_job(job(rows), throughput=Throughput(100.0, 10.0, 5.0, "as given"), within_s=4.0)
    assert told.needed_replicas() is None


def test_the_limit_of_a_job_bounds_its_rows(rows: Path) -> None:
    assert forecast_job(job(rows, limit=10)).as_dict()["num_rows"] == 10


def write_report(file: Path, **changes: Any) -> str:
    report = {
        "summary": {"model": "bundled:invoices", "start_up_s": 8.0},
        "replicas": {"busy_s": 30.0, "idle_s": {"starved": 6, "backpressured": 3, "between_steps": 1, "draining": 99}},
        "counts": {"num_rows": 110, "num_failed": 10, "num_output_tokens": 3000},
        "engines": {"num_output_tokens": 4000},
        "runs": [{}, {}],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**report, **changes}))
    return str(file)


def test_the_last_report_of_the_same_model_gives_the_throughput(rows: Path, tmp_path: Path) -> None:
    named = forecast_job(job(rows), report=write_report(tmp_path / "report.json")).throughput
    assert named is not None
    assert (named.output_tokens_per_s, named.output_tokens_per_row, named.start_up_s) == (100.0, 30.0, 4.0)
    write_report(tmp_path / "out" / "_millrace" / "report.json")
    found = forecast_job(job(rows)).throughput
    assert found is not None
    assert dataclasses.replace(found, basis=named.basis) == named


def test_the_report_of_another_model_gives_no_throughput(rows: Path, tmp_path: Path) -> None:
    other = {"model": "other", "start_up_s": 1.0}
    write_report(tmp_path / "out" / "_millrace" / "report.json", summary=other)
    assert forecast_job(job(rows)).throughput is None
    with pytest.raises(ConfigError, match="of another model"):
        forecast_job(job(rows), report=write_report(tmp_path / "report.json", summary=other))
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no report of a job"):
        forecast_job(job(rows), report=str(tmp_path / "report.json"))


def test_a_throughput_can_be_measured(rows: Path) -> None:
    throughput = forecast_job(job(rows), sample_size=8, measure=True).throughput
    assert throughput is not None
    assert throughput.output_tokens_per_s > 0
    assert 1 <= (throughput.output_tokens_per_row or 0) <= 20


def test_a_sample_is_spread_over_the_input_and_follows_from_its_seed(tmp_path: Path) -> None:
    for part in range(3):
        table = pa.table({"n": range(part * 10_000, (part + 1) * 10_000)})
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=500)
    source = Source.find(str(tmp_path))
    first, again, other = (Sample.take(source, 240, seed) for seed in (1, 1, 2))
    numbers = [row["n"] for row in first.rows]
    assert (first.num_rows, first.is_exact, len(numbers)) == (30_000, True, 240)
    assert numbers == sorted(set(numbers))
    assert numbers == [row["n"] for row in again.rows] != [row["n"] for row in other.rows]
    assert all(any(start <= n < start + 3000 for n in numbers) for start in range(0, 30_000, 3000))


def test_the_number_of_rows_is_guessed_from_their_length_if_they_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"n": {n:06}.5}}\n' for n in range(20_000)).replace(" 0", " 1"))
    source = dataclasses.replace(Source.find(str(tmp_path / "rows.jsonl")), num_rows=None)
    sample = Sample.take(source, 10)
    assert not sample.is_exact
    assert sample.num_rows == pytest.approx(20_000, rel=0.01)


def test_a_sample_of_a_small_input_is_all_of_it(rows: Path) -> None:
    assert len(Sample.take(Source.find(str(rows)), 1000).rows) == 100


@pytest.fixture
def job_file(rows: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file, where Ray must not be started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was started"))
    file = rows.parent / "job.yaml"
    file.write_text(
        "model: bundled:invoices\ninput: rows.jsonl\noutput: out\nmessages: [{role: user, content: '{line}'}]\n"
        "prices: {currency: EUR, per_replica_hour: 2}\n"
    )
    return file


def plan(*args: object) -> int:
    try:
        cli.app(["plan", *map(str, args)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command_shows_the_forecast(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(job_file, "--tokens-per-s", 10, "--within", "30s", "--set", "sampling.max_tokens=10") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "bundled:invoices: 100 rows, 100 of them looked at", "█",
        "6 rows of the sample (6.0%) are beyond max_model_len=512", "3 of 100 looked at", "1 of 100 looked at",
        "2.56M parameters", "3 to be done within 0:30", "10 tokens/s a replica (as given)",
        "at most 1:30 with 1 replica(s)", "at most EUR 0.05 by time of replicas",
    ):  # fmt: skip
        assert text in shown


def test_the_command_gives_json(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(job_file, "--json", "--rows", 20, "--memory", 0.5) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sample"] == {"num_rows": 20, "seed": 0}
    assert told["seconds"] is None
    assert told["engine"]["num_blocks"] > 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--tokens-per-s", 3, "--measure"), "exclude each other"),
        (("--within", "soon"), "--within must be a number and one of s, m, h"),
        (("--report", "nowhere.json"), "nowhere.json is no report of a job"),
        (("--set", "input=nowhere.jsonl"), "does not exist"),
        (("--set", "messages=null", "--set", "prompt={lin}"), "no column 'lin'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    job_file: Path, capfd: pytest.CaptureFixture[str], args: tuple[object, ...], said: str
) -> None:
    assert plan(job_file, *args) == 2
    shown = capfd.readouterr().err
    assert said in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(("text", "seconds"), [("45s", 45.0), ("90m", 5400.0), ("1.5h", 5400.0)])
def test_a_time_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "90", "-1h", "0s", "infh", "nanm"])
def test_any_other_text_is_not_a_time(text: str) -> None:
    with pytest.raises(ConfigError, match="--within"):
        read_duration(text)


def test_a_forecast_is_plain_data(rows: Path) -> None:
    told = forecast_job(job(rows), throughput=Throughput.told(10.0))
    assert isinstance(told, Forecast)
    assert json.loads(json.dumps(told.as_dict())) == told.as_dict()
