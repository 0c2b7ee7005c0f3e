"""Processors and jobs with the real engine, on tiny random models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from report_page import Page, check_page
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from millrace.pipeline import EngineProcessorConfig, Processor, build_llm_processor

pytestmark = pytest.mark.slow

TinyModel = Callable[[str], Path]
ENGINE = {"max_num_seqs": 32, "max_model_len": 128, "num_threads": 1}
DEADLINE_S = 120.0


def config_for(model: Path, **changes: Any) -> EngineProcessorConfig:
    fields = {"model_source": str(model), "engine_kwargs": ENGINE, "batch_size": 64, "should_continue_on_error": True}
    return EngineProcessorConfig(**{**fields, **changes})


def by_id(dataset: ray.data.Dataset) -> dict[int, dict[str, Any]]:
    """Consumes a dataset; every id must be there once."""
    rows = dataset.take_all()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def until(condition: Callable[[], Any]) -> Any:
    """Waits for an event, and fails if it never comes."""
    retrying = Retrying(
        stop=stop_after_delay(DEADLINE_S), wait=wait_fixed(0.05), retry=retry_if_result(lambda x: not x)
    )
    return retrying(condition)


def num_output_tokens(processor: Processor) -> int:
    stats = processor.stats()
    engines = [replica.engine for replica in stats.replicas if replica.engine is not None] if stats else []
    return sum(engine.counters.num_output_tokens for engine in engines)


@contextmanager
def in_background(function: Callable[[], Any]) -> Iterator[list[Any]]:
    """Calls a function beside a block; what it returns is in the list when the block is left."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    yield results
    thread.join(DEADLINE_S)
    assert results, "the dataset was not consumed in time"


def test_each_bad_row_is_told_why_and_all_others_succeed(cluster: None, tiny_model: TinyModel) -> None:
    rows: list[dict[str, Any]] = [{"id": index, "ask": f"row {index}"} for index in range(50)]
    bad: list[Any] = ["", "z " * 1280, 3, None, "unknown parameter", "broken constraint"]
    rows += [{"id": 50 + index, "ask": ask} for index, ask in enumerate(bad)]

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        name = "max_tokns" if row["ask"] == "unknown parameter" else "max_tokens"
        # Of the good rows every other one follows a constraint.
        regex = "[a-z" if row["ask"] == "broken constraint" else "no{2,}" if row["id"] % 2 else None
        held = {} if regex is None else {"structured_outputs": {"regex": regex, "json": None}}
        return {"prompt": row["ask"], "sampling_params": {"temperature": 0, name: 4, **held}}

    with build_llm_processor(config_for(tiny_model("qwen3")), preprocess) as processor:
        out = by_id(processor(ray.data.from_items(rows)))
    assert sorted(out) == list(range(56))
    errors = {index: row["__inference_error__"] for index, row in out.items() if row["__inference_error__"]}
    kinds = ["EmptyPromptError", "PromptTooLongError", *["PromptTypeError"] * 2, *["SamplingParamsError"] * 2]
    assert [errors[index].split(": ")[1] for index in sorted(errors)] == kinds
    assert "did you mean 'max_tokens'?" in errors[54] and "regex cannot be compiled" in errors[55]
    assert all(out[index]["generated_text"].startswith("no") == bool(index % 2) for index in range(50))
    assert all(0 < out[index]["num_generated_tokens"] <= 4 for index in range(50))
    assert all(out[index]["generated_text"] is not None for index in range(50))


@pytest.mark.soak
def test_sampled_rows_repeat_whatever_their_company(cluster: None, tiny_model: TinyModel) -> None:
    sampling = {"temperature": 0.8, "max_tokens": 12}
    rows = [{"id": index, "messages": [{"role": "user", "content": f"row {index}"}]} for index in range(64)]
    with build_llm_processor(
        config_for(tiny_model("llama"), batch_size=16, sampling_params=sampling),
        postprocess=lambda row: {"id": row["id"], "tokens": list(row["generated_tokens"])},
    ) as processor:
        together = by_id(processor(ray.data.from_items(rows)))
        alone = by_id(processor(ray.data.from_items(rows[7:8])))
    assert together[7]["tokens"] == alone[7]["tokens"]
    assert len({tuple(row["tokens"]) for row in together.values()}) > 32


@pytest.mark.soak
def test_two_processors_of_one_engine_share_its_replicas(cluster: None, tiny_model: TinyModel) -> None:
    rows = [{"id": index, "prompt": f"row {index}"} for index in range(20)]
    config = config_for(tiny_model("llama"), sampling_params={"max_tokens": 4}, chat_template_stage=False)
    with build_llm_processor(config) as first:
        with build_llm_processor(config) as second:
            results = [processor(ray.data.from_items(rows)) for processor in (first, second)]
            stats = [processor.stats() for processor in (first, second)]
            assert len({pool.name for pool in stats if pool}) == 1
            assert [len(pool.replicas) for pool in stats if pool] == [1, 1]
            assert [sorted(by_id(result)) for result in results] == [list(range(20))] * 2
        assert sorted(by_id(first(ray.data.from_items(rows)))) == list(range(20))


@pytest.mark.soak
def test_kill_9_of_the_generate_client_loses_and_doubles_no_row(cluster: None, tiny_model: TinyModel) -> None:
    num_rows = 2000
    sampling = {"temperature": 0.8, "max_tokens": 16, "ignore_eos": True}
    config = config_for(tiny_model("llama"), sampling_params=sampling)

    def pid_of_client() -> int | None:
        workers = psutil.process_iter(["cmdline"])
        pids = (one.pid for one in workers if "MapBatches(Generate)" in " ".join(one.info["cmdline"] or []))
        return next(pids, None)

    with build_llm_processor(config, lambda row: {"prompt": f"row {row['id']}"}) as processor:
        results = processor(ray.data.range(num_rows, override_num_blocks=8)).select_columns(
            ["id", "generated_tokens", "__inference_error__"]
        )
        with in_background(lambda: by_id(results)) as done:
            until(lambda: num_output_tokens(processor) > 16 * num_rows // 8)
            os.kill(until(pid_of_client), signal.SIGKILL)
        (out,) = done
    assert sorted(out) == list(range(num_rows))
    assert not any(row["__inference_error__"] for row in out.values())
    assert all(len(row["generated_tokens"]) == 16 for row in out.values())


@pytest.fixture
def job_folder(tmp_path: Path, tiny_model: TinyModel) -> Path:
    """A folder with a job file of 300 rows, two of them bad."""
    lines = [f"line {index}" for index in range(298)] + [None, "z " * 1280]
    pq.write_table(pa.table({"id": list(range(300)), "line": lines}), tmp_path / "in.parquet")
    job = {"model": str(tiny_model("llama")), "input": "in.parquet", "output": "out", "prompt": "{line}"}
    (tmp_path / "job.yaml").write_text(json.dumps({**job, "engine": ENGINE, "sampling": {"max_tokens": 4}}))
    return tmp_path


MILLRACE = [sys.executable, "-c", "from millrace.pipeline.cli import main; main()"]
COMMAND = [*MILLRACE, "run", "job.yaml"]


def run_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*MILLRACE, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done


def test_a_job_writes_results_dead_letters_and_a_report(job_folder: Path) -> None:
    done = run_command(job_folder, "run", "job.yaml")
    assert done.returncode == 3, done.stderr
    assert "300 in, 300 out, 2 failed" in done.stdout
    out = job_folder / "out"
    table = pq.read_table(out)
    assert sorted(table["id"].to_pylist()) == list(range(298))
    assert set(table["finish_reason"].to_pylist()) <= {"stop", "length"}
    failed = sorted(pq.read_table(out / "_failed").to_pylist(), key=lambda row: row["id"])
    assert [(row["id"], row["line"]) for row in failed] == [(298, None), (299, "z " * 1280)]
    assert [row["__error_kind"] for row in failed] == ["PromptTypeError", "PromptTooLongError"]
    report = json.loads((out / "_millrace" / "report.json").read_text())
    check_page(Page((out / "_millrace" / "report.html").read_text()), report)
    assert report["distributions"]["output_tokens"]["count"] == report["distributions"]["e2e_s"]["count"] == 298
    assert report["engines"]["num_output_tokens"] == report["counts"]["num_output_tokens"]
    assert report["replicas"]["held_s"] == pytest.approx(
        report["replicas"]["busy_s"] + sum(report["replicas"]["idle_s"].values()), abs=0.1
    )
    summary = report["summary"]
    assert (summary["num_rows_in"], summary["num_rows_out"], summary["num_rows_failed"]) == (300, 300, 2)
    assert summary["num_output_tokens"] == sum(table["num_generated_tokens"].to_pylist())
    manifest = json.loads((out / "_manifest.json").read_text())
    assert [pq.read_metadata(out / one["name"]).num_rows for one in manifest["files"]] == [298]
    assert not (out / "_millrace" / "work").exists()

    again = run_command(job_folder, "retry-failed", "out")
    assert again.returncode == 3, again.stderr
    assert "300 in, 300 out, 2 failed" in again.stdout
    assert sorted(pq.read_table(out)["id"].to_pylist()) == list(range(298))
    assert pq.read_table(out / "_failed")["__error_attempts"].to_pylist() == [2, 2]


def test_kill_9_of_a_job_and_resume(job_folder: Path) -> None:
    more = ["--max-tokens", "64", "--set", "flush_interval_s=0.2", "--set", "batch_size=16", "--order", "input"]
    work = job_folder / "out" / "_millrace" / "work" / "results"
    with subprocess.Popen(
        [*COMMAND, *more], cwd=job_folder, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        until(lambda: list(work.glob("*.flush")))
        process.kill()
    assert not (job_folder / "out" / "_manifest.json").exists()
    done = run_command(job_folder, "resume", "out")
    assert done.returncode == 3, done.stderr
    assert "going on with the job" in done.stderr
    assert pq.read_table(job_folder / "out")["id"].to_pylist() == list(range(298))
    runs = json.loads((job_folder / "out" / "_millrace" / "report.json").read_text())["runs"]
    assert sum(run["work"]["num_output_tokens"] for run in runs[-1:]) < 298 * 64


def test_a_job_that_stops_says_why_in_a_line(job_folder: Path) -> None:
    command = [*COMMAND, "--on-error", "stop"]
    done = subprocess.run(command, cwd=job_folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: a row failed in " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_everything(job_folder: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "--max-tokens", "100"], cwd=job_folder, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        family = until(lambda: _with_replica(process.pid))
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(DEADLINE_S) == 130, said
    assert f"go on with: millrace resume {job_folder / 'out'}" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(family, timeout=DEADLINE_S)[1]


def _with_replica(pid: int) -> list[psutil.Process]:
    """Returns all processes of a job once its replica is among them."""
    family = psutil.Process(pid).children(recursive=True)
    return family if any("EngineReplica" in " ".join(one.cmdline()) for one in family if one.is_running()) else []
