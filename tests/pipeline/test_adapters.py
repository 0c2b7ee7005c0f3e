"""Datasets whose rows name adapters, with the real engine on a tiny model."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from adapters import make_adapter
from millrace.engine import LLM, CompletionOutput, GenerateRequest, LoRARequest, SamplingParams
from millrace.pipeline import EngineProcessorConfig, JobConfig, Processor, build_llm_processor, run_job
from millrace.pipeline.openai_batch import BatchConfig, run_batch

pytestmark = pytest.mark.slow

TinyModel = Callable[[str], Path]
NAMES = [f"adapter-{index}" for index in range(20)]
SAMPLING = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
ENGINE = {"dtype": "float32", "max_num_seqs": 32, "max_model_len": 64, "num_threads": 1, "max_loras": 4}
DEADLINE_S = 300.0


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    """A folder of twenty adapters of different ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    for index, name in enumerate(NAMES):
        targets = None if index % 2 else ["q_proj", "v_proj", "down_proj"]
        make_adapter(folder / name, tiny_model("llama"), rank=(4, 8, 16)[index % 3], targets=targets, seed=index)
    return folder


def config_for(model: Path, **changes: Any) -> EngineProcessorConfig:
    fields = {"model_source": str(model), "engine_kwargs": ENGINE, "batch_size": 64, "should_continue_on_error": True}
    return EngineProcessorConfig(**{**fields, "sampling_params": SAMPLING, **changes})


def answers_of(model: Path, adapters: Path, rows: Sequence[dict[str, Any]]) -> dict[int, CompletionOutput]:
    """Returns the output of each row by its id, from one engine in this process that runs one adapter at a time."""
    engine = LLM(str(model), **{**ENGINE, "max_loras": 1}, enable_lora=True).llm_engine
    found: dict[int, CompletionOutput] = {}
    for number, name in enumerate([None, *NAMES]):
        named = None if name is None else LoRARequest(name, number, str(adapters / name))
        for row in rows:
            if row["model"] == name:
                params = SamplingParams(**SAMPLING)
                engine.add_request(GenerateRequest(str(row["id"]), row["prompt"], None, params, lora_request=named))
        while engine.has_unfinished_requests():
            for output in engine.step():
                assert output.error is None
                found[int(output.request_id)] = output.outputs[0]
    return found


def until(condition: Callable[[], Any]) -> Any:
    """Waits for an event, and fails if it never comes."""
    limits = {"stop": stop_after_delay(DEADLINE_S), "wait": wait_fixed(0.02)}
    return Retrying(retry=retry_if_result(lambda met: not met), **limits)(condition)


def busy_replicas(processor: Processor, num_tokens: int) -> list[int]:
    """Returns the process ids of the replicas that have generated more than so many tokens."""
    stats = processor.stats()
    replicas = [one for one in stats.replicas if one.engine is not None and one.pid] if stats else []
    return [one.pid for one in replicas if one.engine.counters.num_output_tokens > num_tokens]


@pytest.mark.soak
def test_each_row_of_twenty_adapters_is_answered_once_and_by_its_adapter_although_a_replica_is_killed(
    cluster: None, tiny_model: TinyModel, adapters: Path
) -> None:
    names = [None, *NAMES]
    rows = [{"id": index, "prompt": f"row {index // 21}", "model": names[index % 21]} for index in range(2000)]
    random.Random(0).shuffle(rows)
    config = config_for(tiny_model("llama"), concurrency=2, dynamic_lora_loading_path=str(adapters))
    with build_llm_processor(config) as processor:
        results = processor(ray.data.from_items(rows, override_num_blocks=16))
        done: list[list[dict[str, Any]]] = []
        consumer = threading.Thread(target=lambda: done.append(results.take_all()), daemon=True)
        consumer.start()
        both = until(lambda: len(pids := busy_replicas(processor, 600)) == 2 and pids)
        os.kill(both[0], signal.SIGKILL)
        consumer.join(DEADLINE_S)
        stats = processor.stats()
    (out,) = done
    assert stats is not None
    assert sum(one.num_restarts for one in stats.replicas) >= 1
    assert sorted(row["id"] for row in out) == list(range(2000))
    assert not any(row["__inference_error__"] for row in out)
    asked = {row["id"]: row["model"] for row in rows}
    assert all(row["model"] == asked[row["id"]] for row in out)
    expected = answers_of(tiny_model("llama"), adapters, rows)
    assert {row["id"]: list(row["generated_tokens"]) for row in out} == {
        row_id: list(output.token_ids) for row_id, output in expected.items()
    }
    assert len({tuple(expected[row["id"]].token_ids) for row in rows if row["prompt"] == "row 7"}) > 15


def test_a_row_whose_adapter_cannot_be_used_fails_alone_with_the_reason(
    cluster: None, tiny_model: TinyModel, adapters: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    large = make_adapter(tmp_path / "large", tiny_model("llama"), rank=64)
    modules = {"good": str(adapters / NAMES[0]), "broken": str(tmp_path / "broken"), "large": str(large)}
    config = config_for(tiny_model("llama"), lora_modules={**modules, "gone": str(tmp_path / "gone")})
    models = ["good", "broken", None, "gone", "large", str(adapters / NAMES[1]), "../x", str(tiny_model("llama"))] * 3
    rows = [{"id": index, "prompt": f"row {index}", "model": model} for index, model in enumerate(models)]
    with build_llm_processor(config) as processor:
        out = {row["id"]: row for row in processor(ray.data.from_items(rows)).take_all()}
    assert sorted(out) == list(range(len(rows)))
    for row in rows:
        error = out[row["id"]]["__inference_error__"]
        if row["model"] in ("good", None, str(tiny_model("llama"))):
            assert not error
            assert len(out[row["id"]]["generated_tokens"]) == 6
        else:
            assert error.startswith("generate: AdapterError: ")
            assert row["model"] in error


def test_a_job_reads_adapters_from_its_input_and_reports_rows_and_tokens_by_adapter(
    cluster: None, tiny_model: TinyModel, adapters: Path, tmp_path: Path
) -> None:
    models = [None, NAMES[0], NAMES[1], "missing"]
    rows = [{"id": index, "prompt": f"row {index // 4}", "model": models[index % 4]} for index in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    job = JobConfig(
        model=str(tiny_model("llama")),
        input=str(tmp_path / "in.parquet"),
        output=str(tmp_path / "out"),
        prompt="{prompt}",
        sampling=SAMPLING,
        engine=ENGINE,
        dynamic_lora_loading_path=str(adapters),
    )
    summary = run_job(job)
    assert (summary.num_rows_out, summary.num_rows_failed) == (40, 10)
    done = [row for row in rows if row["model"] != "missing"]
    expected = answers_of(tiny_model("llama"), adapters, done)
    out = {row["id"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert {row_id: row["generated_text"] for row_id, row in out.items()} == {
        row_id: output.text for row_id, output in expected.items()
    }
    assert {row_id: row["model"] for row_id, row in out.items()} == {row["id"]: row["model"] for row in done}
    failed = pq.read_table(tmp_path / "out" / "_failed").to_pylist()
    assert {row["model"] for row in failed} == {"missing"}
    assert all(row["__error_kind"] == "AdapterError" and "missing" in row["__error_message"] for row in failed)
    counted = json.loads((tmp_path / "out" / "_millrace" / "report.json").read_text())["counts"]["adapters"]
    assert {name: (rows["num_rows"], rows["num_output_tokens"]) for name, rows in counted.items()} == dict.fromkeys(
        NAMES[:2], (10, 60)
    )


def test_lines_of_a_batch_file_ask_for_adapters_by_name(
    cluster: None, tiny_model: TinyModel, adapters: Path, tmp_path: Path
) -> None:
    models = ["base", "zero", "one", "gone", "/etc"]
    rows = [{"id": index, "prompt": f"row {index // 5}", "model": models[index % 5]} for index in range(20)]
    with (tmp_path / "in.jsonl").open("w") as lines:
        for row in rows:
            body = {"model": row["model"], "prompt": row["prompt"], "temperature": 0, "max_tokens": 6}
            asked = {"custom_id": str(row["id"]), "method": "POST", "url": "/v1/completions", "body": body}
            lines.write(json.dumps(asked) + "\n")
    places = [f"zero={adapters / NAMES[0]}", f"one={adapters / NAMES[1]}", f"gone={tmp_path / 'gone'}"]
    config = BatchConfig(
        model=str(tiny_model("llama")),
        input=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "out.jsonl"),
        engine=ENGINE,
        lora_modules=places,
    )
    run_batch(config)
    answers = {int(one["custom_id"]): one for one in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    folders = {"base": None, "zero": NAMES[0], "one": NAMES[1]}
    done = [{**row, "model": folders[row["model"]]} for row in rows if row["model"] in folders]
    expected = answers_of(tiny_model("llama"), adapters, done)
    bodies = {row_id: one["response"]["body"] for row_id, one in answers.items()}
    assert {row_id: body["model"] for row_id, body in bodies.items()} == {
        row["id"]: row["model"] for row in rows if row["model"] in folders
    }
    # Without `ignore_eos`, which a body has no field for, a text may be shorter.
    assert all(expected[row_id].text.startswith(body["choices"][0]["text"]) for row_id, body in bodies.items())
    errors = [json.loads(one) for one in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [one["error"]["code"] for one in errors] == ["model_not_found"] * 8
    assert {one["response"]["status_code"] for one in errors} == {404}
