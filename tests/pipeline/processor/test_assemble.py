"""What becomes of a row on its way through the operators of a processor: its errors, its columns, its companions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from fake_client import EchoClient, FakePool
from ray import cloudpickle

from millrace.pipeline import CustomStage, EngineProcessorConfig, Processor, StageConfig
from millrace.pipeline.processor.engine_backend import EngineBackend
from millrace.pipeline.processor.engine_stages import engine_stages
from millrace.pipeline.stages.base import BatchStage

# Workers cannot import from the tests, so what is defined here travels as it is.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("cluster")

STAGES = ["preprocess", "chat_template", "tokenize", "generate", "detokenize", "postprocess"]


def echo_backend(config: EngineProcessorConfig) -> EngineBackend:
    """An engine that reads the prompt back."""
    return EngineBackend(config, start_pool=lambda _: FakePool(), make_client=EchoClient)  # type: ignore[arg-type, return-value]


def test_a_stage_gets_as_many_rows_at_once_as_its_batch_size(make_config: Callable[..., EngineProcessorConfig]) -> None:
    class Count(BatchStage):
        name = "count"

        def __init__(self, column: str) -> None:
            super().__init__()
            self._column = column

        def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            return [{self._column: len(rows)} for _ in rows]

    def counting(column: str, batch_size: int, **place: str) -> CustomStage:
        return CustomStage(Count, {"column": column}, config=StageConfig(batch_size=batch_size), **place)

    config = make_config(batch_size=16)
    stages = [
        echo_backend(config),
        counting("large before", 48, before="GenerateStage"),
        counting("small before", 4, before="GenerateStage"),
        counting("small after", 8),
        counting("large after", 80),
    ]
    with Processor(config, stages) as processor:
        rows = processor(ray.data.from_items([{"prompt": "a"}] * 240, override_num_blocks=1)).take_all()
    sizes = {name: {row[name] for row in rows} for name in rows[0] if name.endswith(("before", "after"))}
    # Blocks are joined for a stage after the engine, and the rows beyond the last whole batch are a smaller one.
    assert max(sizes.pop("large after")) == 80
    assert sizes == {"large before": {48}, "small before": {4}, "small after": {8}}


def test_an_error_in_any_stage_fails_its_row_only() -> None:
    config = EngineProcessorConfig(model_source="bundled:invoices", batch_size=16, should_continue_on_error=True)

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        broken = {
            "preprocess": {},
            "chat_template": {"messages": [{"role": "user"}]},
            "tokenize": {"prompt": 3},
            "generate": {"prompt": "fail"},
            "detokenize": {"prompt": "undecodable"},
        }
        if row["at"] == "preprocess":
            raise ValueError("no")
        return broken.get(row["at"], {"prompt": "ok"})

    def postprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {"at": row["at"], "text": row["generated_text"], "nothing": 1 / (row["at"] != "postprocess")}

    with Processor(config, engine_stages(config, echo_backend(config)), preprocess, postprocess) as processor:
        rows = processor(ray.data.from_items([{"at": at} for at in [*STAGES, "nowhere"] * 2])).take_all()
    failed_at = [(row["at"], row["__inference_error__"].split(":")[0]) for row in rows]
    assert sorted(failed_at) == sorted([*((at, at) for at in STAGES), ("nowhere", "")] * 2)


def test_failed_rows_do_not_change_the_columns_of_the_others(
    make_processor: Callable[..., Processor], tmp_path: Path
) -> None:
    def postprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "count": row["num_generated_tokens"], "text": row["generated_text"], "tags": [1, 2]}

    rows = [{"id": index, "prompt": "fail" if index < 8 or index % 5 == 0 else "x"} for index in range(64)]
    with make_processor(None, postprocess) as processor:
        processor(ray.data.from_items(rows, override_num_blocks=8)).write_parquet(str(tmp_path))
    tables = [pq.read_table(path) for path in tmp_path.glob("*.parquet")]
    table = pa.concat_tables(tables, promote_options="default")
    assert table.num_rows == 64
    assert {field.name: field.type for field in table.schema} == {
        "id": pa.int64(),
        "count": pa.int64(),
        "text": pa.string(),
        "tags": pa.list_(pa.int64()),
        "prompt": pa.string(),
        "finish_reason": pa.string(),
        "__inference_error__": pa.string(),
    }
