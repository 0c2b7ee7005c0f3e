"""A whole job whose replica is killed half-way: no row is lost or doubled, and no row depends on its replica."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import ray

from millrace import LLM, SamplingParams, build_llm_processor, vLLMEngineProcessorConfig

NUM_ROWS = 2000
MAX_TOKENS = 12


def sampling(row_id: int) -> dict[str, Any]:
    """Returns the sampling parameters of a row: random draws, with a seed of its own."""
    return {"temperature": 0.8, "seed": row_id, "max_tokens": MAX_TOKENS, "ignore_eos": True}


def prompt(row_id: int) -> str:
    """Returns the prompt of a row: prompts have many lengths, and some share a beginning."""
    return ("a common beginning of " * (row_id % 3)) + f"row {row_id} " + "x" * (row_id % 17)


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt(row["id"]), "sampling_params": sampling(row["id"])}


def keep(row: dict[str, Any]) -> dict[str, Any]:
    names = ("id", "generated_text", "generated_tokens", "finish_reason", "attempt")
    return {name: row[name] for name in names}


def engine_config(model: Path, **kwargs: Any) -> vLLMEngineProcessorConfig:
    settings = {"dtype": "float32", "max_num_seqs": 32, "num_threads": 1}
    return vLLMEngineProcessorConfig(
        model_source=str(model), engine_kwargs=settings, batch_size=64, chat_template_stage=False, **kwargs
    )


class KillOnce(threading.Thread):
    """Kills the first replica's process, with SIGKILL, once it has generated half of the job's tokens."""

    def __init__(self, processor: Any, num_tokens: int) -> None:
        super().__init__(daemon=True)
        self.processor, self.num_tokens = processor, num_tokens
        self.killed: int | None = None

    def run(self) -> None:
        while self.killed is None:
            for replica in self.processor.stats().replicas:
                if replica.engine is not None and replica.engine.counters.num_output_tokens > self.num_tokens:
                    self.killed = replica.pid
                    os.kill(replica.pid, signal.SIGKILL)


def test_killed_replica_loses_doubles_and_changes_nothing(
    cluster: None, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("qwen3")
    rows = ray.data.from_items([{"id": i} for i in range(NUM_ROWS)], override_num_blocks=8)
    with build_llm_processor(engine_config(model), preprocess=ask, postprocess=keep) as processor:
        results = processor(rows)
        killer = KillOnce(processor, NUM_ROWS * MAX_TOKENS // 2)
        killer.start()
        results.write_parquet(str(tmp_path / "out"))
        killer.join()
    written = pads.dataset(tmp_path / "out", format="parquet").to_table().to_pylist()
    assert Counter(row["id"] for row in written) == Counter(range(NUM_ROWS))
    assert all(row["finish_reason"] == "length" and len(row["generated_tokens"]) == MAX_TOKENS for row in written)
    again = [row["id"] for row in written if row["attempt"] > 1]
    assert again, "the replica was to die with rows on board"

    checked = sorted(set(again[:32]) | set(range(32)))
    with LLM(str(model), dtype="float32", max_num_seqs=1, num_threads=1) as llm:
        params = [SamplingParams(**sampling(i)) for i in checked]
        alone = llm.generate([prompt(i) for i in checked], params, use_tqdm=False)
    tokens = {row["id"]: list(row["generated_tokens"]) for row in written}
    assert [tokens[i] for i in checked] == [output.outputs[0].token_ids for output in alone]
