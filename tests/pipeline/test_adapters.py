"""Datasets whose rows name adapters, with the real engine on a tiny model."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray.data
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from adapters import make_adapter
from millrace.engine import LLM, GenerateRequest, LoRARequest, SamplingParams
from millrace.pipeline import EngineProcessorConfig, Processor, build_llm_processor

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


def answers_of(model: Path, adapters: Path, rows: Sequence[dict[str, Any]]) -> dict[int, list[int]]:
    """Returns the tokens of each row by its id, from one engine in this process that runs one adapter at a time."""
    engine = LLM(str(model), **{**ENGINE, "max_loras": 1}, enable_lora=True).llm_engine
    found: dict[int, list[int]] = {}
    for number, name in enumerate([None, *NAMES]):
        named = None if name is None else LoRARequest(name, number, str(adapters / name))
        for row in rows:
            if row["model"] == name:
                params = SamplingParams(**SAMPLING)
                engine.add_request(GenerateRequest(str(row["id"]), row["prompt"], None, params, lora_request=named))
        while engine.has_unfinished_requests():
            for output in engine.step():
                assert output.error is None
                found[int(output.request_id)] = list(output.outputs[0].token_ids)
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
    assert {row["id"]: list(row["generated_tokens"]) for row in out} == expected
    assert len({tuple(expected[row["id"]]) for row in rows if row["prompt"] == "row 7"}) > 15


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
